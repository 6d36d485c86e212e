"""Pretrained encoders: torchvision's network, MMAction2's names and VGGish as published are the references."""

from __future__ import annotations

import fractions
import pathlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16_bn
from torchvision.models.video import mvit

from mubic_deploy.config import DEMO, FULL, Config
from mubic_deploy.errors import UserError
from mubic_deploy.model.mubic import MUBiC, random_model
from mubic_deploy.model.visual import PIXEL_MEAN, PIXEL_STD
from mubic_deploy.training.pretrained import Report, load_vggish, load_visual

MVIT_V2_S: dict[str, Any] = {name: getattr(FULL, name) for name in ("visual_channels", "visual_depths", "visual_heads")}


def visual_config(height: int, width: int) -> Config:
    """The full visual encoder; the rest small, to be quick."""
    return replace(DEMO, height=height, width=width, **MVIT_V2_S)


def randomise(module: nn.Module) -> None:
    """Weights that leave no two tensors alike: fresh norms are all one, fresh class tokens all zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 3:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def hollow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes, one zero each in a file."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in tensors.items()}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def shipped() -> mvit.MViT:
    network = mvit.mvit_v2_s(weights=None).eval()
    randomise(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rel_pos" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


@pytest.fixture(scope="module")
def torchvision_file(shipped: mvit.MViT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    file = tmp_path_factory.mktemp("weights") / "mvit_v2_s-random.pth"
    torch.save(shipped.state_dict(), file)
    yield file
    file.unlink()  # 140 MB


def assert_features_agree(shipped: mvit.MViT, model: MUBiC) -> None:
    """The four scales of torchvision's network as it is, with its own tables, and of ours."""
    expected: list[tuple[torch.Tensor, tuple[int, int, int]]] = []
    hooks = [shipped.blocks[i].register_forward_hook(lambda _m, _i, out: expected.append(out)) for i in (0, 2, 13, 15)]
    video = torch.randint(0, 256, (1, 16, model.config.height, model.config.width, 3), dtype=torch.uint8)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # torchvision's blocks take any grid, but the network says which
        patch.setattr(shipped.pos_encoding, "spatial_size", (model.config.height // 4, model.config.width // 4))
        shipped((video.permute(0, 4, 1, 2, 3) / 255 - PIXEL_MEAN) / PIXEL_STD)
        features = model.visual_encoder(video)
    for hook in hooks:
        hook.remove()
    for feature, (tokens, thw) in zip(features, expected, strict=True):
        assert feature.shape[2:] == thw
        assert relative_difference(feature, tokens[:, 1:].mT.reshape(feature.shape)) < 1e-4


def test_torchvisions_weights_give_torchvisions_features(shipped, torchvision_file):
    model = random_model(visual_config(224, 224))
    report = load_visual(model, torchvision_file)
    assert report == Report(
        str(torchvision_file),
        "torchvision MViT_V2_S",
        matched=tuple(model.visual_encoder.state_dict()),
        interpolated=(),
        left_out=("norm.weight", "norm.bias", "head.1.weight", "head.1.bias"),
        missing=(),
    )
    assert_features_agree(shipped, model)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (80, 128)])
def test_on_another_grid_the_bias_is_torchvisions(size, shipped, torchvision_file):
    """torchvision's 224 x 224 network, run on another size, interpolates its tables itself. At 80 x 128 a scale has
    an odd side, which pooling rounds up."""
    model = random_model(visual_config(*size))
    assert load_visual(model, torchvision_file).interpolated
    assert_features_agree(shipped, model)


def test_tables_at_full_size_are_used_as_torchvision_would(shipped, torchvision_file):
    """Kept for the longer side, 96 places, the tables of the shorter one, 56, must come back unblurred."""
    model = random_model(visual_config(224, 384))
    report = load_visual(model, torchvision_file)
    # places of the grid along height and width in each block, and that both tables are kept for
    places = [(56, 96), *[(28, 48)] * 2, *[(14, 24)] * 12, (7, 12)]
    interpolated = []
    for index, (height, width) in enumerate(places):
        theirs, ours = (network.get_submodule(f"blocks.{index}.attn") for network in (shipped, model.visual_encoder))
        for axis, n in (("h", height), ("w", width)):
            name = f"rel_pos_{axis}"
            original, kept = theirs.get_parameter(name), ours.get_parameter(name)
            assert len(kept) == 2 * width - 1
            expected = mvit._interpolate(original, 2 * n - 1)
            assert torch.allclose(mvit._interpolate(kept, 2 * n - 1), expected, atol=1e-5)
            assert kept.abs().max() < 1.5 * original.abs().max()  # nothing wild between the places used
            interpolated.append(f"blocks.{index}.attn.{name}")
        assert torch.equal(ours.get_parameter("rel_pos_t"), theirs.get_parameter("rel_pos_t"))
    assert report.interpolated == tuple(interpolated)


class MMAction2Attention(nn.Module):
    def __init__(self, before: int, after: int, head: int, places: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(before, 3 * after)
        self.proj = nn.Linear(after, after)
        for of in "qkv":
            self.add_module(f"pool_{of}", nn.Conv3d(head, head, 3, groups=head, bias=False))
            self.add_module(f"norm_{of}", nn.LayerNorm(head))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * places - 1, head))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * places - 1, head))
        self.rel_pos_t = nn.Parameter(torch.zeros(15, head))


class MMAction2Block(nn.Module):
    def __init__(self, before: int, after: int, places: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(before)
        self.attn = MMAction2Attention(before, after, 96, places)
        self.norm2 = nn.LayerNorm(after)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(after, 4 * after)
        self.mlp.fc2 = nn.Linear(4 * after, after)
        self.proj = nn.Linear(before, after) if before != after else None


class MMAction2Recognizer(nn.Module):
    """Names and shapes of MMAction2's Recognizer3D with MViT small for 16 x 224 x 224, no computation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = nn.Module()
        b = self.backbone
        b.cls_token = nn.Parameter(torch.zeros(1, 1, 96))
        b.patch_embed = nn.Module()
        b.patch_embed.projection = nn.Conv3d(3, 96, (3, 7, 7))
        widths = [96, 96, 192, 192, *[384] * 11, 768, 768]  # before the first block, after each
        places = [56, 28, 28, *[14] * 12, 7]
        b.blocks = nn.ModuleList(map(MMAction2Block, widths[:-1], widths[1:], places))
        b.norm3 = nn.LayerNorm(768)
        self.cls_head: Any = nn.Module()
        self.cls_head.fc_cls = nn.Linear(768, 400)


def mmaction2_of(shipped: Any) -> MMAction2Recognizer:
    """The same network in MMAction2's modules, matched module by module."""
    network = MMAction2Recognizer()
    b = network.backbone
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (b.patch_embed.projection, shipped.conv_proj),
        (b.norm3, shipped.norm),
        (network.cls_head.fc_cls, shipped.head[1]),
    ]
    with torch.no_grad():
        b.cls_token[0, 0] = shipped.pos_encoding.class_token
        for theirs, block in zip(b.blocks, shipped.blocks, strict=True):
            pairs += [(theirs.norm1, block.norm1), (theirs.norm2, block.norm2)]
            pairs += [(theirs.attn.qkv, block.attn.qkv), (theirs.attn.proj, block.attn.project[0])]
            pairs += [(theirs.mlp.fc1, block.mlp[0]), (theirs.mlp.fc2, block.mlp[3])]
            if theirs.proj is not None:
                pairs.append((theirs.proj, block.project))
            for of in "qkv":
                pool = getattr(block.attn, f"pool_{of}")
                pairs += [(getattr(theirs.attn, f"pool_{of}"), pool.pool)]
                pairs += [(getattr(theirs.attn, f"norm_{of}"), pool.norm_act[0])]
            for name in ("rel_pos_t", "rel_pos_h", "rel_pos_w"):
                theirs.attn.get_parameter(name).copy_(block.attn.get_parameter(name))
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    return network


def test_mmaction2s_file_gives_the_same_model(shipped, torchvision_file, tmp_path):
    content = {"meta": {"mmengine_version": "0.1.0"}, "state_dict": mmaction2_of(shipped).state_dict()}
    file = tmp_path / "mvit-small-p244_16x4x1_kinetics400-rgb.pth"
    torch.save(content, file)
    expected, model = random_model(visual_config(64, 96), 1), random_model(visual_config(64, 96), 2)
    of_torchvision = load_visual(expected, torchvision_file)
    report = load_visual(model, file)
    file.unlink()  # 140 MB
    for name, tensor in expected.visual_encoder.state_dict().items():
        assert torch.equal(model.visual_encoder.state_dict()[name], tensor), name
    assert report.format == "MMAction2 MViT small"
    assert report.matched == of_torchvision.matched
    assert report.interpolated == of_torchvision.interpolated
    assert [name.split(".")[-2] for name in report.left_out] == ["norm3", "norm3", "fc_cls", "fc_cls"]
    # only the visual encoder changed
    untouched = random_model(visual_config(64, 96), 2)
    for name, tensor in untouched.fusion.state_dict().items():
        assert torch.equal(model.fusion.state_dict()[name], tensor)


def vggish_as_published() -> nn.Sequential:
    """VGGish's convolutions: log-mel [B, 1, 96 time, 64 mel] -> [B, 512, 6, 4]."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(128, 256, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(256, 512, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers).eval()


AUDIO = replace(DEMO, audio_patch=(64, 96), vggish_channels=FULL.vggish_channels, audio_heads=FULL.audio_heads)


@pytest.fixture(scope="module")
def vggish_tensors() -> dict[str, torch.Tensor]:
    """As in `vggish-10086976.pth`; the embeddings much narrower."""
    torch.manual_seed(0)
    network = vggish_as_published()
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # PyTorch's own start fades over six layers
            nn.init.uniform_(layer.get_parameter("bias"), -0.1, 0.1)
    tensors = {}
    for name, value in network.state_dict().items():
        tensors[f"features.{name}"] = value
    return tensors | {f"embeddings.{i}.{kind}": torch.randn(2) for i in (0, 2, 4) for kind in ("weight", "bias")}


def published(tensors: dict[str, torch.Tensor]) -> nn.Sequential:
    network = vggish_as_published()
    trunk = (value for name, value in tensors.items() if name.startswith("features."))
    network.load_state_dict(dict(zip(network.state_dict(), trunk, strict=True)))
    return network


def test_vggish_computes_what_vggish_computes(vggish_tensors, tmp_path):
    file = tmp_path / "vggish-10086976.pth"
    torch.save(OrderedDict(vggish_tensors), file, _use_new_zipfile_serialization=False)  # it is of 2019
    model = random_model(AUDIO)
    refine = {name: value.clone() for name, value in model.audio_encoder.refine.state_dict().items()}
    report = load_vggish(model, file)
    assert report.format == "torchvggish VGGish"
    assert report.matched == tuple(f"vggish.{i}.{kind}" for i in (0, 3, 6, 8, 11, 13) for kind in ("weight", "bias"))
    assert report.left_out == tuple(f"embeddings.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias"))
    assert report.missing == tuple(f"refine.{name}" for name in refine)
    assert all(torch.equal(value, refine[name]) for name, value in model.audio_encoder.refine.state_dict().items())
    with torch.no_grad():
        # sound of every loudness, at the native patch, to the border
        t = torch.arange(16_608) / 16_000
        audio = torch.stack([torch.randn(t.shape) * t.square(), torch.sin(2 * torch.pi * (200 + 900 * t) * t)])
        log_mel = model.audio_encoder.log_mel(audio).flatten(0, 1)[:, None]
        features = model.audio_encoder.vggish(model.audio_encoder.patches(audio))
        assert features.shape == (8, 512, 4, 6)
        assert relative_difference(features.mT, published(vggish_tensors)(log_mel)) < 1e-4


def test_safetensors_are_read_too(vggish_tensors, tmp_path):
    torch.save(vggish_tensors, tmp_path / "a.pth")
    save_file(vggish_tensors, tmp_path / "a.safetensors")
    models = [random_model(AUDIO, seed) for seed in (1, 2)]
    for model, name in zip(models, ("a.pth", "a.safetensors"), strict=True):
        load_vggish(model, tmp_path / name)
    a, b = (model.audio_encoder.vggish.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_report_is_short():
    report = Report("x.pth", "torchvision MViT_V2_S", ("a", "b.rel_pos_h"), ("b.rel_pos_h",), ("head",), ("refine",))
    assert report.summary() == (
        "x.pth: torchvision MViT_V2_S, 2 tensors loaded (1 interpolated), 1 of the file left out, "
        "1 of the encoder not in the file"
    )


def assert_refused(load, model: MUBiC, file: pathlib.Path, message: str) -> None:
    """One line that says it, and the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load(model, file)
    assert str(caught.value) == f"{file} {message}"
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_hold_no_weights_are_refused(tmp_path):
    model = random_model(AUDIO)
    saved: dict[str, Any] = {
        "list.pth": [torch.zeros(2)],
        "other.pth": {"state_dict": {"fc.weight": torch.zeros(2)}},
        "objects.pth": {"state_dict": {"features.0.weight": torch.zeros(2)}, "meta": fractions.Fraction(1, 2)},
    }
    for name, content in saved.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:-50])
    for name, text in (("text.pth", "hello weights"), ("empty.pth", ""), ("text.safetensors", "hello")):
        (tmp_path / name).write_text(text)
    for name, message in (
        ("none.pth", "does not exist: name a file of weights"),
        (".", "is a directory: name a file of weights"),
        ("text.pth", "is no PyTorch file, or is damaged: name another file"),
        ("empty.pth", "is no PyTorch file, or is damaged: name another file"),
        ("cut.pth", "is no PyTorch file, or is damaged: name another file"),
        ("text.safetensors", "is no safetensors file, or is damaged: name another file"),
        ("list.pth", "holds a list, not named tensors: name a file of weights"),
        (
            "objects.pth",
            "holds Python objects, which could run code: if you trust it, save its state_dict alone and name that file",
        ),
        (
            "other.pth",
            "holds none of the tensors expected: name a file of torchvggish VGGish (features.0.weight), "
            "MUBiC audio encoder (audio_encoder.vggish.0.weight)",
        ),
    ):
        assert_refused(load_vggish, model, tmp_path / name, message)
    assert_refused(
        load_visual,
        model,
        tmp_path / "other.pth",
        "holds none of the tensors expected: name a file of torchvision MViT_V2_S (conv_proj.weight), "
        "MMAction2 MViT small (backbone.patch_embed.projection.weight)",
    )


def test_files_of_another_size_are_refused(torchvision_file, vggish_tensors, tmp_path):
    demo, file = random_model(DEMO), tmp_path / "a.pth"
    misfit = "does not fit the config 'demo':"
    shapes = "[96, 3, 3, 7, 7] in the file and [32, 3, 3, 7, 7] in the model: use --config full"
    assert_refused(load_visual, demo, torchvision_file, f"{misfit} conv_proj.weight is {shapes}")
    torch.save(hollow(MMAction2Recognizer().state_dict()), file)
    assert_refused(load_visual, demo, file, f"{misfit} backbone.patch_embed.projection.weight is {shapes}")
    torch.save(vggish_tensors, file)
    shapes = "[64, 1, 3, 3] in the file and [16, 1, 3, 3] in the model: use --config full"
    assert_refused(load_vggish, demo, file, f"{misfit} features.0.weight is {shapes}")
    # VGG for pictures has the same names
    with torch.device("meta"):
        pictures = vgg16_bn(weights=None).state_dict()
    torch.save(hollow(pictures), file)
    full = random_model(replace(AUDIO, name="full"))
    shapes = "[64, 3, 3, 3] in the file and [64, 1, 3, 3] in the model: name another file"
    assert_refused(load_vggish, full, file, f"does not fit the config 'full': features.0.weight is {shapes}")


def test_files_that_are_not_whole_are_refused(shipped, vggish_tensors, tmp_path):
    """Nor are those of a larger network, of which a part would fit."""
    file = tmp_path / "a.pth"
    model = random_model(visual_config(64, 96))
    whole = hollow(shipped.state_dict())
    for lost in ("pos_encoding.class_token", "blocks.3.attn.rel_pos_t"):
        torch.save({name: value for name, value in whole.items() if name != lost}, file)
        message = f"it lacks the encoder's {lost} (1 in all): name the file as it was published"
        assert_refused(load_visual, model, file, f"is no whole torchvision MViT_V2_S: {message}")
    torch.save(whole | {"blocks.16.norm1.weight": torch.zeros(768)}, file)
    message = "which has no place for blocks.16.norm1.weight: name another file"
    assert_refused(load_visual, model, file, f"does not fit the config 'demo', {message}")
    torch.save({name: value for name, value in vggish_tensors.items() if "features.0.bias" not in name}, file)
    message = "it lacks the encoder's vggish.0.bias (1 in all): name the file as it was published"
    assert_refused(load_vggish, random_model(AUDIO), file, f"is no whole torchvggish VGGish: {message}")


def test_a_model_that_hears_nothing_takes_no_vggish(tmp_path):
    with pytest.raises(UserError, match="the variant 'visual_only' has no audio encoder"):
        load_vggish(random_model(replace(DEMO, variant="visual_only")), tmp_path / "none.pth")
