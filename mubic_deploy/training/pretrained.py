"""Pretrained encoders from files that the user names.

| file | made by | goes to |
| --- | --- | --- |
| `mvit_v2_s-*.pth` | torchvision (Kinetics-400) | `visual_encoder` |
| `mvit-small-p244_16x4x1_kinetics400-rgb*.pth` | MMAction2 (Kinetics-400); DiffSal's start | `visual_encoder` |
| `vggish-10086976.pth` | torchvggish (AudioSet) | `audio_encoder.vggish` |
| any name | `mubic-deploy listen` (rendered scenes) | `audio_encoder` |

Each may also be a .safetensors file with the same names. A file is loaded whole or not at all: it must hold every
tensor of its network's trunk, position tables and class token too, and each must fit; the model changes only then."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mubic_deploy.config import FULL, Config
from mubic_deploy.errors import UserError
from mubic_deploy.model.audio import LOG_HIGH, LOG_LOW
from mubic_deploy.model.mubic import MUBiC
from mubic_deploy.model.visual import block_settings


class Rule(NamedTuple):
    """A tensor's whole name in the file (a regular expression) and in the encoder."""

    theirs: str
    ours: str
    change: Callable[[Tensor], Tensor] | None = None  # of the shape


@dataclass(frozen=True)
class Layout:
    """How a published file names what the encoder has. The first rule that matches a name counts; names without a
    rule (heads, last norms) are left out."""

    format: str
    mark: str  # a name that tells this layout from others
    rules: tuple[Rule, ...]
    own: tuple[str, ...] = ()  # how names of the encoder begin that are MUBiC's alone: no file has them

    def rename(self, file: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """(their name, our name, tensor) of each tensor that a rule matches."""
        for theirs, tensor in file.items():
            for rule in self.rules:
                match = re.fullmatch(rule.theirs, theirs)
                if match:
                    yield theirs, match.expand(rule.ours), rule.change(tensor) if rule.change else tensor
                    break


# the encoder is built of torchvision's own blocks
TORCHVISION = Layout(
    "torchvision MViT_V2_S",
    "conv_proj.weight",
    (Rule(r"(conv_proj\..+|pos_encoding\.class_token|blocks\..+)", r"\1"),),
)
# qkv, kernels and tables lie in memory as torchvision's; only the class token has another shape
BLOCK = r"backbone\.(blocks\.\d+)\."
MMACTION2 = Layout(
    "MMAction2 MViT small",
    "backbone.patch_embed.projection.weight",
    (
        Rule(r"backbone\.patch_embed\.projection\.(.+)", r"conv_proj.\1"),
        Rule(r"backbone\.cls_token", "pos_encoding.class_token", Tensor.flatten),  # [1, 1, C]
        Rule(BLOCK + r"(norm[12]\..+|attn\.qkv\..+|attn\.rel_pos_[thw])", r"\1.\2"),
        Rule(BLOCK + r"attn\.pool_([qkv])\.(.+)", r"\1.attn.pool_\2.pool.\3"),
        Rule(BLOCK + r"attn\.norm_([qkv])\.(.+)", r"\1.attn.pool_\2.norm_act.0.\3"),
        Rule(BLOCK + r"attn\.proj\.(.+)", r"\1.attn.project.0.\2"),
        Rule(BLOCK + r"proj\.(.+)", r"\1.project.\2"),
        Rule(BLOCK + r"mlp\.fc1\.(.+)", r"\1.mlp.0.\2"),
        Rule(BLOCK + r"mlp\.fc2\.(.+)", r"\1.mlp.3.\2"),
    ),
)
VGGISH = Layout(
    "torchvggish VGGish",
    "features.0.weight",
    (Rule(r"features\.(.+)", r"vggish.\1"),),
    own=("refine.",),
)
LISTENER = Layout("MUBiC audio encoder", "audio_encoder.vggish.0.weight", (Rule(r"audio_encoder\.(.+)", r"\1"),))
TABLE = re.compile(r".*\.rel_pos_[thw]")


@dataclass(frozen=True)
class Report:
    """What a file gave: names of tensors, `left_out` as the file has them, the others as the encoder has them."""

    file: str
    format: str
    matched: tuple[str, ...]
    interpolated: tuple[str, ...]  # of the matched: position tables of another grid
    left_out: tuple[str, ...]  # in the file, and of no use here
    missing: tuple[str, ...]  # in the encoder, and by design not in the file: they stay as they were

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.file}: {self.format}, {len(self.matched)} tensors loaded ({len(self.interpolated)} interpolated), "
            f"{len(self.left_out)} of the file left out, {len(self.missing)} of the encoder not in the file"
        )


def load_visual(model: MUBiC, path: str | Path) -> Report:
    """Load the MViTv2-S trunk of torchvision's or MMAction2's Kinetics-400 file into `model.visual_encoder`.

    The files' position tables are for 16 x 224 x 224; for another grid they are interpolated so that the bias is what
    the file's network computes when it is run on that grid. UserError, with the model as it was, if the file is
    missing, unreadable, incomplete, of another network or of another size than the model."""
    tensors, report = _read_for(model.visual_encoder, Path(path), (TORCHVISION, MMACTION2), model.config)
    distances = table_distances(model.config)
    lengths = {name: value.shape[0] for name, value in model.visual_encoder.state_dict().items() if name in distances}
    for name in report.interpolated:
        tensors[name] = fit_table(tensors[name], lengths[name], distances[name])
    model.visual_encoder.load_state_dict(tensors, strict=False)
    return report


def load_vggish(model: MUBiC, path: str | Path) -> Report:
    """Load VGGish's six convolutions into `model.audio_encoder.vggish`; the temporal refinement is MUBiC's own. A file
    that `mubic-deploy listen` made holds both, as they are.

    VGGish sees patches [96 frames, 64 mel] of log(mel + 0.01), natural logarithm, lowest band first. Ours are
    transposed and scaled to [0, 1], so the kernels are transposed and the scaling is folded into the first one. Then
    each of our convolutions computes what VGGish's does, to the border: patches are padded with its log-mel of 0.

    UserError as for `load_visual`, and for a model without an audio encoder."""
    if not model.config.has_audio:
        raise UserError(f"the variant {model.config.variant!r} has no audio encoder: leave VGGish's weights out")
    tensors, report = _read_for(model.audio_encoder, Path(path), (VGGISH, LISTENER), model.config)
    if report.format == LISTENER.format:
        model.audio_encoder.load_state_dict(tensors, strict=False)
        return report
    tensors = {name: value.mT if value.ndim == 4 else value for name, value in tensors.items()}
    # w * (LOG_LOW + (LOG_HIGH - LOG_LOW) x) + b
    kernel = tensors["vggish.0.weight"]
    tensors["vggish.0.weight"] = kernel * (LOG_HIGH - LOG_LOW)
    tensors["vggish.0.bias"] = tensors["vggish.0.bias"] + LOG_LOW * kernel.sum((1, 2, 3))
    model.audio_encoder.load_state_dict(tensors, strict=False)
    return report


def table_distances(config: Config) -> dict[str, int]:
    """Relative distances that each position table must tell apart on this model's grid: {"blocks.0.attn.rel_pos_t":
    15, ..}, 2 max(q, k) - 1 places along the axis."""
    size = [config.time, *config.grids[0]]
    distances = {}
    for index, setting in enumerate(block_settings(config)):
        q_size = [-(-n // s) for n, s in zip(size, setting.stride_q, strict=True)]
        k_size = [-(-n // s) for n, s in zip(size, setting.stride_kv, strict=True)]
        for axis, q, k in zip("thw", q_size, k_size, strict=True):
            distances[f"blocks.{index}.attn.rel_pos_{axis}"] = 2 * max(q, k) - 1
        size = q_size
    return distances


def fit_table(table: Tensor, length: int, distances: int) -> Tensor:
    """[L, d] -> [length, d], which `relative_table` resizes to the grid's `distances` just as it would the original.

    torchvision, and so the model, keeps tables of the longer side's length for both sides and resizes the shorter
    side's where it is used: at 224 x 384 a height's 111 vectors are kept as 191 and used as 111. Resized twice, they
    are blurred, so what the blur takes is added: the smallest change that does, by the pseudo-inverse. This is exact
    where the longer side is a multiple of 32; else the last scale's table is kept too short, and gets the nearest."""
    table = table.double()
    kept = _resize(table, length)
    if length != distances:
        back = _resize(torch.eye(length, dtype=table.dtype), distances)
        kept += torch.linalg.pinv(back) @ (_resize(table, distances) - _resize(kept, distances))
    return kept.float()


def _resize(table: Tensor, length: int) -> Tensor:
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T


def _read_for(
    encoder: nn.Module, path: Path, layouts: tuple[Layout, ...], config: Config
) -> tuple[dict[str, Tensor], Report]:
    """The file's tensors in float32 by the encoder's names, all that it needs and each of its shape but for tables'
    lengths. UserError if that cannot be had."""
    file = _read(path)
    tensors = {name: value for name, value in file.items() if isinstance(value, Tensor)}
    layout = next((layout for layout in layouts if layout.mark in tensors), None)
    if layout is None:
        known = ", ".join(f"{layout.format} ({layout.mark})" for layout in layouts)
        raise UserError(f"{path} holds none of the tensors expected: name a file of {known}")
    expected = encoder.state_dict()
    found = {ours: (theirs, tensor) for theirs, ours, tensor in layout.rename(tensors)}
    _check(path, layout, expected, found, config)
    fitting = {ours: tensor.float() for ours, (_, tensor) in found.items()}
    used = {theirs for theirs, _ in found.values()}
    report = Report(
        str(path),
        layout.format,
        matched=tuple(name for name in expected if name in fitting),
        interpolated=tuple(n for n in expected if n in fitting and fitting[n].shape != expected[n].shape),
        left_out=tuple(name for name in file if name not in used),
        missing=tuple(name for name in expected if name not in fitting),
    )
    return fitting, report


def _check(
    path: Path,
    layout: Layout,
    expected: dict[str, Tensor],
    found: dict[str, tuple[str, Tensor]],
    config: Config,
) -> None:
    """UserError if a tensor has another shape, is missing, or has no counterpart."""
    for name, ours in expected.items():
        theirs_name, theirs = found.get(name, (name, ours))
        free = int(TABLE.fullmatch(name) is not None)  # a table's length is interpolated
        if theirs.ndim != ours.ndim or theirs.shape[free:] != ours.shape[free:]:
            remedy = "name another file" if config.name == FULL.name else f"use --config {FULL.name}"
            if layout is LISTENER:
                remedy = f"make one with mubic-deploy listen --config {config.name}"
            raise UserError(
                f"{path} does not fit the config {config.name!r}: {theirs_name} is {list(theirs.shape)} in the file "
                f"and {list(ours.shape)} in the model: {remedy}"
            )
    missing = [name for name in expected if name not in found and not name.startswith(layout.own)]
    if missing:
        raise UserError(
            f"{path} is no whole {layout.format}: it lacks the encoder's {missing[0]} ({len(missing)} in all): "
            "name the file as it was published"
        )
    odd = [theirs for ours, (theirs, _) in found.items() if ours not in expected]
    if odd:
        raise UserError(
            f"{path} does not fit the config {config.name!r}, which has no place for {odd[0]}: name another file"
        )


def _read(path: Path) -> dict[str, Any]:
    """The names and values of a PyTorch or safetensors file, without what a checkpoint wraps around them. UserError
    if there is no such file, or it holds anything but plain data."""
    if not path.is_file():
        raise UserError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}: name a file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): name another file") from None
    except Exception as error:  # on foreign bytes torch.load fails as they happen to steer it
        if isinstance(error, UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(
                f"{path} holds Python objects, which could run code: if you trust it, save its state_dict alone and "
                "name that file"
            ) from None
        kind = "safetensors" if isinstance(error, SafetensorError) else "PyTorch"
        raise UserError(f"{path} is no {kind} file, or is damaged: name another file") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors: name a file of weights")
    return content
