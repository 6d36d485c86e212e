"""The model against other implementations: torchvision for the attention, torchaudio for the log-mel."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio
from half_fixtures import TINY
from safetensors.torch import save_file
from torchvision.models.video import mvit
from torchvision.models.video.mvit import MultiscaleAttention

from mubic_deploy import checkpoint, graphs
from mubic_deploy.config import DEMO, FULL, VARIANTS, Config, get_config
from mubic_deploy.engines import eager
from mubic_deploy.errors import UserError
from mubic_deploy.model.audio import LogMel
from mubic_deploy.model.layers import STC
from mubic_deploy.model.mubic import cost, empty_inputs, random_model
from mubic_deploy.model.visual import PIXEL_MEAN, PIXEL_STD, FoldedAttention, VisualEncoder
from mubic_deploy.parity import random_clip
from mubic_deploy.pipeline import Pipeline


def random_positions(model: torch.nn.Module, std: float = 1.0) -> None:
    """Position tables that are large, so that a mistake in the bias shows."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize(
    ("thw", "stride_q", "stride_kv"),
    [((4, 6, 10), 1, 2), ((4, 7, 12), 2, 1), ((3, 5, 5), 1, 1), ((2, 9, 4), 2, 4)],
)
def test_folded_attention_is_torchvisions(thw, stride_q, stride_kv):
    torch.manual_seed(0)
    arguments = ([*thw], 12, 24, 2, [3, 3, 3], [3, 3, 3], [1, stride_q, stride_q], [1, stride_kv, stride_kv])
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    shipped = MultiscaleAttention(*arguments, **options).eval()
    random_positions(shipped)
    folded = FoldedAttention(*arguments, **options).eval()
    folded.load_state_dict(shipped.state_dict())
    x = torch.randn(2, 1 + thw[0] * thw[1] * thw[2], 12)
    with torch.no_grad():
        expected, expected_thw = shipped(x, thw)
        first, first_thw = folded(x, thw)
        again, _ = folded(x, thw)  # from the tables kept
    assert first_thw == expected_thw
    assert torch.allclose(first, expected, atol=1e-5)
    assert (again == first).all()


def test_folded_attention_trains_as_torchvisions():
    torch.manual_seed(0)
    arguments = ([2, 4, 4], 8, 8, 1, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2])
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    shipped, folded = (kind(*arguments, **options) for kind in (MultiscaleAttention, FoldedAttention))
    random_positions(shipped)
    folded.load_state_dict(shipped.state_dict())
    x = torch.randn(2, 33, 8)
    for module in (shipped, folded):
        module(x, (2, 4, 4))[0].square().sum().backward()
    for name, parameter in shipped.named_parameters():
        assert torch.allclose(folded.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-3), name


def test_kept_positions_follow_changes_in_place():
    encoder = random_model(replace(DEMO, height=32, width=48)).visual_encoder
    video = torch.randint(0, 256, (1, 16, 32, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = encoder(video)[0]
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name:
                parameter.add_(torch.randn_like(parameter))
        assert (encoder(video)[0] - before).abs().max() > 1e-3


def test_positions_follow_the_weights():
    """Tables kept from one checkpoint are not used with the next one's weights."""
    config = replace(DEMO, height=32, width=48)
    a, b = random_model(config, 0).visual_encoder, random_model(config, 1).visual_encoder
    video = torch.randint(0, 256, (1, 16, 32, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        a(video)
        a.load_state_dict(b.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(a(video), b(video), strict=True))


def test_full_visual_encoder_is_torchvisions_mvit_v2_s(monkeypatch):
    """Same weights by name, same features: torchvision's own network, its blocks read out at the scales' ends."""
    torch.manual_seed(0)
    # mvit_v2_s fixes the size to 224 x 224; take the rest of what it builds with as it is
    monkeypatch.setattr(mvit, "_mvit", lambda **options: options)
    options = mvit.mvit_v2_s(stochastic_depth_prob=0.2)
    options = {k: v for k, v in options.items() if k not in ("weights", "progress")}
    shipped = mvit.MViT(**options | {"spatial_size": (224, 384)}).eval()
    random_positions(shipped, 0.1)  # five times a fresh model's; with more, 16 blocks multiply rounding errors
    encoder = VisualEncoder(FULL).eval()
    weights = {k: v for k, v in shipped.state_dict().items() if not k.startswith(("norm.", "head."))}
    encoder.load_state_dict(weights)  # strict: every name must match

    expected = []
    for index in (0, 2, 13, 15):
        shipped.blocks[index].register_forward_hook(lambda _m, _i, out: expected.append(out))
    video = torch.randint(0, 256, (1, 16, 224, 384, 3), dtype=torch.uint8)
    with torch.no_grad():
        shipped((video.permute(0, 4, 1, 2, 3) / 255 - PIXEL_MEAN) / PIXEL_STD)
        features = encoder(video)
    for feature, (tokens, thw), tensor in zip(features, expected, graphs.visual_features(FULL), strict=True):
        assert feature.shape[1:] == tensor.shape
        assert torch.allclose(feature, tokens[:, 1:].mT.reshape(1, -1, *thw), atol=1e-4)


def test_log_mel_is_torchaudios():
    """torchaudio puts the 25 ms window in the middle of its 512-sample frame: 56 zeros before and after align it.

    Its float32 FFT is itself 2e-4 from the truth where a loud tone leaves a far bin nearly empty, so it computes in
    float64 here."""
    rng = np.random.default_rng(0)
    t = np.arange(16_608) / 16_000
    chord = sum(0.1 * np.sin(2 * np.pi * f * t) for f in (220, 277, 330, 3000))
    sounds = [rng.uniform(-1, 1, t.size), chord, 0.5 * np.sin(2 * np.pi * 440 * t), np.zeros(t.size)]
    audio = torch.tensor(np.stack([*sounds, 1e-4 * rng.normal(size=t.size)]), dtype=torch.float32)
    size = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 64}
    mel = torchaudio.transforms.MelSpectrogram(16_000, f_min=125, f_max=7500, power=1, center=False, **size).double()
    got = LogMel()(audio)
    assert got.shape == (5, 4, 96, 64)
    for i in range(4):
        slices = torch.nn.functional.pad(audio[:, 336 * i : 336 * i + 15_600], (56, 56))
        expected = (mel(slices.double()) + 0.01).log().mT
        assert (got[:, i] - expected).abs().max() < 1e-4


def test_patches_are_in_the_unit_interval_and_silence_is_zero():
    encoder = random_model(DEMO).audio_encoder
    full_scale = torch.sin(2 * torch.pi * 1000 / 16_000 * torch.arange(16_608))[None]
    patches = encoder.patches(torch.cat([full_scale, torch.zeros(1, 16_608)]))
    assert patches.shape == (8, 1, 66, 98)
    rim = patches.clone()
    rim[..., 1:-1, 1:-1] = math.log(0.01) / (math.log(0.01) - 5.5)
    assert torch.allclose(rim, rim[0, 0, 0, 0])  # a log-mel of 0, with which VGGish pads
    patches = patches[..., 1:-1, 1:-1]
    assert patches[:4].max() < 1  # louder than any sound can be, and not cut
    assert patches[:4].max() > 0.8
    assert patches[4:].abs().max() < 1e-6
    # mel axis up: the tone sits at one height at all times; 1 kHz lies on HTK's mel scale between bins 19 and 22
    assert 17 <= patches[0, 0].mean(1).argmax() <= 23


def test_stc_drops_no_row_or_column():
    """5 x 7 places in windows of 4: 2 x 2, the last ones padded; each place changes exactly its own window."""
    torch.manual_seed(0)
    stc = STC(3, 4).eval()
    x = torch.randn(1, 2, 5, 7, 3)
    before = stc(x)
    assert before.shape == (1, 2 * 2 * 2, 3)
    for row, column in ((4, 6), (3, 3), (4, 0)):
        y = x.clone()
        y[0, 1, row, column] += 1
        changed = (stc(y) != before).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [4 + 2 * (row // 4) + column // 4]


THESIS = {"full": 79.60, "no_beca": 75.60, "no_skip": 78.80, "concat": 77.00}


@pytest.fixture(scope="module")
def full_costs():
    return {variant: cost(get_config("full", variant)) for variant in VARIANTS}


def test_full_has_the_thesis_size(full_costs):
    full = full_costs["full"]
    assert full.parameters_without_vggish == pytest.approx(79.60e6, rel=0.01)
    assert full.macs_4_steps <= 192.4e9
    assert full.parameters - full.parameters_without_vggish == 4_499_712  # VGGish's six convolutions


@pytest.mark.parametrize("variant", ["no_beca", "no_skip", "concat"])
def test_variants_differ_as_the_thesis_says(full_costs, variant):
    saved = full_costs["full"].parameters - full_costs[variant].parameters
    assert saved / 1e6 == pytest.approx(THESIS["full"] - THESIS[variant], abs=0.5)


def test_macs_are_those_of_the_mvit_that_was_published(full_costs):
    """MViTv2-S takes 127.8 GMACs at 224 x 384 without its bias; the folded positions add 27 columns to the 96 of a
    head in one of the two attention products."""
    assert 127.8e9 < full_costs["full"].macs["visual_encoder"] < 127.8e9 * 1.07


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_to_its_signatures(variant):
    config = get_config("demo", variant)
    model = random_model(config)
    for name, signature in graphs.signatures(config).items():
        with torch.no_grad():
            outputs = model.graph(name)(*empty_inputs(signature, 2))
        for tensor, output in zip(signature.outputs, outputs, strict=True):
            tensor.check(output.numpy())


def test_audio_and_video_and_seed_all_matter():
    pipeline = Pipeline(DEMO, eager.load_engines(random_model(DEMO)))
    a, b = random_clip(DEMO, 0), random_clip(DEMO, 1)

    def predict(video, audio, seed):
        return pipeline.predict(video["VIDEO"], audio["AUDIO"], seed)[0]

    base = predict(a, a, 0)
    assert base.shape == (1, 56, 96)
    assert base.dtype == np.float32
    assert 0 <= base.min() < base.max() <= 1
    assert (predict(a, a, 0) == base).all()
    for other in (predict(b, a, 0), predict(a, b, 0), predict(a, a, 1)):
        assert np.abs(other - base).max() > 1e-6


def test_visual_only_is_deaf_and_no_diffusion_takes_one_step():
    config = get_config("demo", "visual_only")
    pipeline = Pipeline(config, eager.load_engines(random_model(config)))
    a, b = random_clip(config, 0), random_clip(config, 1)
    assert (pipeline.predict(a["VIDEO"], a["AUDIO"])[0] == pipeline.predict(a["VIDEO"], b["AUDIO"])[0]).all()

    config = get_config("demo", "no_diffusion")
    pipeline = Pipeline(config, eager.load_engines(random_model(config)))
    assert pipeline.predict(a["VIDEO"], a["AUDIO"])[1].tolist() == [[1]]
    assert pipeline.predict(a["VIDEO"], a["AUDIO"], 0, 0)[1].tolist() == [[1]]
    with pytest.raises(UserError, match="steps 4 is out of range: use 1 to 1"):
        pipeline.predict(a["VIDEO"], a["AUDIO"], 0, 4)


@pytest.mark.parametrize("variant", ["full", "no_diffusion"])
def test_large_contexts_do_not_saturate_the_map(variant):
    """The fusion's contexts are not normalised: a map of nothing but 0 and 1 has no gradient to learn from."""
    config = get_config("demo", variant)
    model = random_model(config)
    inputs = empty_inputs(graphs.signatures(config)["denoiser"], 1)
    torch.manual_seed(0)
    contexts = [300 * torch.randn_like(x) for x in inputs[:4]]
    with torch.no_grad():
        found = model.denoiser(*contexts, *inputs[4:])[0]
    assert 0.01 < found.min() < found.max() < 0.99


def test_samples_of_a_batch_do_not_see_each_other():
    """Different steps in one batch, adaptive among them, give the maps that each gives alone."""
    model = random_model(DEMO)
    model.get_parameter("fusion.adaptive.mlp.2.bias").data.fill_(2.0)
    pipeline = Pipeline(DEMO, eager.load_engines(model))
    clip = random_clip(DEMO, 0, batch=3)
    seeds, steps = np.array([5, 6, 7]), np.array([1, 6, 0])
    together, used = pipeline.predict(clip["VIDEO"], clip["AUDIO"], seeds, steps)
    assert used[:, 0].tolist() == [1, 6, 2]
    for i in range(3):
        alone, _ = pipeline.predict(clip["VIDEO"][i : i + 1], clip["AUDIO"][i : i + 1], seeds[i], steps[i])
        assert np.abs(together[i] - alone[0]).max() < 1e-5


def test_the_encoders_run_once_whatever_the_steps():
    engines = eager.load_engines(random_model(DEMO))
    calls: dict[str, int] = dict.fromkeys(engines, 0)

    def counted(name, engine):
        def run(inputs):
            calls[name] += 1
            return engine(inputs)

        return run

    pipeline = Pipeline(DEMO, {name: counted(name, engine) for name, engine in engines.items()})
    clip = random_clip(DEMO, 0)
    pipeline.predict(clip["VIDEO"], clip["AUDIO"], 0, 8)
    assert calls == {"visual_encoder": 1, "audio_encoder": 1, "fusion": 1, "denoiser": 8}


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("VIDEO", np.zeros((1, 16, 112, 190, 3), np.uint8), "tensor VIDEO must be uint8"),
        ("VIDEO", np.zeros((1, 16, 112, 192, 3), np.float32), "not float32"),
        ("AUDIO", np.zeros((1, 16_000), np.float32), "tensor AUDIO must be float32"),
    ],
)
def test_wrong_tensors_are_named(tensor, value, message):
    pipeline = Pipeline(DEMO, eager.load_engines(random_model(DEMO)))
    clip = random_clip(DEMO, 0) | {tensor: value}
    with pytest.raises(UserError, match=message):
        pipeline.predict(clip["VIDEO"], clip["AUDIO"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": np.zeros((2, 16_608), np.float32)}, "VIDEO has 1 clips and AUDIO 2"),
        ({"seed": [1, 2]}, "give one whole number for all clips, or 1, one a clip"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"steps": 13}, "steps 13 is out of range: use 1 to 12, or adaptive"),
        ({"video": np.zeros((0, 16, 112, 192, 3), np.uint8)}, "no clip in the batch"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    pipeline = Pipeline(DEMO, eager.load_engines(random_model(DEMO)))
    clip = random_clip(DEMO, 0)
    with pytest.raises(UserError, match=message):
        pipeline.predict(**{"video": clip["VIDEO"], "audio": clip["AUDIO"]} | changes)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_is_the_loop(steps):
    model = random_model(TINY, 5)
    looped = Pipeline(TINY, eager.load_engines(model))
    engines = eager.load_engines(model, fixed_steps=steps)
    del engines["denoiser"]  # it takes no part
    sampled = Pipeline(TINY, engines, fixed_steps=steps)
    clip = random_clip(TINY, 1, batch=2)
    expected, _ = looped.predict(clip["VIDEO"], clip["AUDIO"], np.array([4, 9]), steps)
    saliency, used = sampled.predict(clip["VIDEO"], clip["AUDIO"], np.array([4, 9]), steps)
    np.testing.assert_allclose(saliency, expected, rtol=0, atol=1e-6)
    assert used.tolist() == [[steps]] * 2
    assert "sampler" not in dict(model.named_modules())  # it is no part of the checkpoint


def test_other_steps_than_the_samplers_go_through_the_loop():
    model = random_model(TINY, 5)
    looped, sampled = (Pipeline(TINY, eager.load_engines(model, fixed_steps=n), fixed_steps=n) for n in (None, 2))
    clip = random_clip(TINY, 1, batch=2)
    for steps in (1, np.array([2, 3]), 0):
        expected, n = looped.predict(clip["VIDEO"], clip["AUDIO"], 0, steps)
        saliency, m = sampled.predict(clip["VIDEO"], clip["AUDIO"], 0, steps)
        np.testing.assert_array_equal(saliency, expected)
        assert n.tolist() == m.tolist()
    for config, wrong in ((TINY, 13), (TINY, 0), (replace(TINY, variant="no_diffusion"), 2)):
        with pytest.raises(UserError, match=f"fixed steps {wrong} is out of range: use 1 to"):
            eager.load_engines(random_model(config), fixed_steps=wrong)


def test_random_weights_are_the_seeds_and_leave_the_global_state():
    state = torch.get_rng_state()
    a, b, c = (random_model(DEMO, seed).state_dict() for seed in (0, 0, 1))
    assert (torch.get_rng_state() == state).all()
    assert all((a[k] == b[k]).all() for k in a)
    assert any((a[k] != c[k]).any() for k in a)


def test_both_attentions_have_the_same_weights_and_maps():
    clip = random_clip(DEMO, 0)
    pipelines = [Pipeline(DEMO, eager.load_engines(random_model(DEMO, 2, folded))) for folded in (True, False)]
    maps = [pipeline.predict(clip["VIDEO"], clip["AUDIO"])[0] for pipeline in pipelines]
    assert np.abs(maps[0] - maps[1]).max() < 1e-5


def test_checkpoint_round_trip(tmp_path):
    model = random_model(get_config("demo", "concat"), 3)
    file = tmp_path / "model.safetensors"
    checkpoint.save(model, file)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded, source = checkpoint.load(str(file))
    assert loaded.config == model.config
    assert source.seed is None
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="holds the variant 'concat', not 'full'"):
        checkpoint.load(str(file), "full")


def test_bad_checkpoints_are_named(tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    cut = tmp_path / "cut.safetensors"
    checkpoint.save(random_model(DEMO), cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other, {"config": json.dumps({**DEMO.to_json(), "colour": 1})})
    odd = {}
    for field, value in (("variant", "later"), ("visual_heads", [1, 2, 4]), ("visual_heads", [5, 5, 5, 5])):
        odd[field, len(value)] = tmp_path / f"{field}_{len(value)}.safetensors"
        save_file(
            {"x": torch.zeros(1)}, odd[field, len(value)], {"config": json.dumps({**DEMO.to_json(), field: value})}
        )
    for name, message in (
        (str(odd["variant", 5]), r"variant_5.safetensors is not a MUBiC checkpoint \(unknown variant 'later'"),
        (str(odd["visual_heads", 3]), r"visual_heads_3.safetensors is not a MUBiC checkpoint \(visual_heads .* kind"),
        (str(odd["visual_heads", 4]), r"visual_heads_4.safetensors.*: "),
        (str(other), r"other.safetensors is not a MUBiC checkpoint \(.* does not fit this version \(fields colour\)\)"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path), "is a directory"),
        (str(text), "is not a MUBiC checkpoint"),
        (str(cut), "is not a MUBiC checkpoint"),
        ("random:huge", "unknown checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            checkpoint.load(name)
        assert "\n" not in str(caught.value)


def test_config_survives_json_and_refuses_strangers():
    for config in (FULL, replace(FULL, fit="crop")):
        assert Config.from_json(config.to_json()) == config
    older = FULL.to_json()
    del older["fit"]
    assert Config.from_json(older) == FULL
    for broken in ({}, {**FULL.to_json(), "colour": 1}, [1]):
        with pytest.raises(ValueError, match="does not fit this version"):
            Config.from_json(broken)  # type: ignore[arg-type]
    others: tuple[tuple[dict, str], ...] = (
        ({"frames": "16"}, "of another kind"),
        ({"visual_channels": 5}, "of another kind"),
        ({"visual_channels": [96, 192, 384]}, "of another kind"),
        ({"visual_heads": [1, 2, 4, "8"]}, "of another kind"),
        ({"noise_channels": [64, 128.5, 256, 512]}, "of another kind"),
        ({"name": None}, "of another kind"),
        ({"audio_heads": 0}, "is below 1"),
        ({"variant": "later"}, "unknown variant 'later'"),
        ({"fit": "zoom"}, "unknown fit 'zoom': choose one of letterbox, stretch, crop"),
        ({"frames": 12}, "frames must be a multiple of 8, height and width multiples of 16, not 12 x 224 x 384"),
        ({"width": 390}, "not 16 x 224 x 390"),
    )
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            Config.from_json({**FULL.to_json(), **other})
    with pytest.raises(UserError, match="frames must be a multiple of 8"):
        replace(DEMO, height=0, width=-16)


def test_pipelines_open_by_name(tmp_path):
    """The same weights from a name and from a file."""
    file = tmp_path / "model.safetensors"
    checkpoint.save(random_model(DEMO, 4), file)
    clip = random_clip(DEMO, 0)
    maps = [
        Pipeline.open(source, engine="eager", seed=seed).predict(clip["VIDEO"], clip["AUDIO"])[0]
        for source, seed in (("random:demo", 4), (file, None))
    ]
    assert (maps[0] == maps[1]).all()
    with pytest.raises(UserError, match="unknown engine 'tpu'"):
        Pipeline.open(engine="tpu")
