"""Sizes and variants. Every shape in the package derives from one `Config` (thesis, tables 3.1 and 4.1)."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mubic_deploy.errors import UserError, whole

VARIANTS = ("full", "no_beca", "no_skip", "concat", "no_diffusion", "visual_only")  # Table 4.3
FITS = ("letterbox", "stretch", "crop")  # how frames meet the model's size, see `mubic_deploy.media.fit`
PRECISIONS = ("float32", "float16")  # of the graphs; NumPy's names
PAD_HEADS, SPLIT_DEPTHWISE = "pad_heads", "split_depthwise"
OPTIMISATIONS = (PAD_HEADS, SPLIT_DEPTHWISE)  # of a graph, see `mubic_deploy.model.optimise`
TOKENS, CHANNELS_LAST = "tokens", "channels_last"  # of what PyTorch compiles or runs
REWRITES = (*OPTIMISATIONS, TOKENS, CHANNELS_LAST)  # all that `mubic_deploy.model.optimise` knows, in its order
ON_GPU = (PAD_HEADS, TOKENS)  # those that a compiler for a GPU gets

# Constants of the method, the same for every size.
DIFFUSION_STEPS = 1000  # T, Table 4.1
SCHEDULE_GAMMA = 0.008  # eq. 3.16
MAX_STEPS = 12
DEFAULT_STEPS = 4
MAX_BATCH = 8  # clips that graphs, packages and engines take at once, unless told otherwise
SAMPLE_RATE = 16_000  # Hz
SLICE_SAMPLES = 15_600  # VGGish's native patch: 96 frames of 25 ms every 10 ms
SLICE_HOP = 336  # samples, 21 ms
AUDIO_SLICES = 4  # T_a
AUDIO_SAMPLES = SLICE_SAMPLES + (AUDIO_SLICES - 1) * SLICE_HOP  # 16 608
DEMO_CHECKPOINT = "demo"  # the default wherever a checkpoint is needed
RANDOM = "random:"  # before the name of a size: random weights
CHECKPOINTS = "random:full, random:demo, demo or a .safetensors file"  # what can be named
DEMO_FILE = Path(__file__).parent / "weights" / "demo.safetensors"  # what it stands for
ADAPTIVE = 0  # the STEPS value that asks for adaptive N
MOST_SEED = 2**63 - 1  # an int64


def check_seed(seed: int) -> int:
    """`seed` if it is an integer from 0 to MOST_SEED, else UserError."""
    return whole("seed", seed, 0, MOST_SEED)


def check_optimisations(names: Collection[str], known: Sequence[str] = OPTIMISATIONS) -> None:
    """UserError for a name that is none of `known`."""
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown optimisation {unknown[0]!r}: choose from {', '.join(known)}")


def check_precision(name: str) -> str:
    """`name` if it is one of PRECISIONS, else UserError."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}: choose {' or '.join(PRECISIONS)}")
    return name


def check_fit(name: str) -> str:
    """`name` if it is one of FITS, else UserError."""
    if name not in FITS:
        raise UserError(f"unknown fit {name!r}: choose one of {', '.join(FITS)}")
    return name


@dataclass(frozen=True)
class Config:
    """One model. Tuples over the four scales run from the finest (i = 1) to the coarsest (i = 4).

    fit: how the frames that it was trained on met its size; what runs it fits frames so unless told otherwise."""

    name: str
    variant: str = "full"
    fit: str = FITS[0]
    frames: int = 16
    height: int = 224
    width: int = 384
    # visual encoder (MViTv2)
    visual_channels: tuple[int, int, int, int] = (96, 192, 384, 768)
    visual_depths: tuple[int, int, int, int] = (1, 2, 11, 2)
    visual_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    # audio encoder (VGGish)
    audio_patch: tuple[int, int] = (112, 192)
    vggish_channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    audio_heads: int = 8
    audio_ffn: int = 2048
    # fusion: widths are narrow where tokens are many and wide where they are few
    ffn_channels: tuple[int, int, int, int] = (16, 32, 96, 784)
    beca_channels: tuple[int, int, int, int] = (32, 96, 192, 1152)
    beca_heads: tuple[int, int, int, int] = (1, 3, 6, 18)
    gate_channels: tuple[int, int, int, int] = (16, 32, 96, 1760)
    # denoiser
    noise_channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    step_channels: int = 512
    decoder_channels: tuple[int, int, int, int] = (24, 48, 128, 256)
    decoder_heads: tuple[int, int, int, int] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"unknown variant {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        check_fit(self.fit)
        units = (2 * AUDIO_SLICES, 16, 16)
        if any(n < 1 or n % unit for n, unit in zip((self.frames, self.height, self.width), units, strict=True)):
            raise UserError(
                f"config {self.name!r}: frames must be a multiple of {units[0]}, height and width multiples of 16, "
                f"not {self.frames} x {self.height} x {self.width}"
            )

    @property
    def time(self) -> int:
        """Time steps of the visual features (the patch embedding has stride 2)."""
        return self.frames // 2

    @property
    def middle(self) -> int:
        """Index of the frame that the map belongs to."""
        return self.frames // 2

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(h_i, w_i) of the four scales: 1/4, 1/8, 1/16, 1/32 of the input, rounded up (eq. 3.13)."""
        return tuple((-(-self.height // s), -(-self.width // s)) for s in (4, 8, 16, 32))

    @property
    def map_size(self) -> tuple[int, int]:
        """(h, w) of the noise and of the saliency map."""
        return self.height // 2, self.width // 2

    @property
    def audio_grid(self) -> tuple[int, int]:
        """(h_a, w_a) of VGGish's last feature: four poolings by 2."""
        return self.audio_patch[0] // 16, self.audio_patch[1] // 16

    @property
    def has_audio(self) -> bool:
        return self.variant != "visual_only"

    @property
    def max_steps(self) -> int:
        return 1 if self.variant == "no_diffusion" else MAX_STEPS

    @property
    def default_steps(self) -> int:
        return min(DEFAULT_STEPS, self.max_steps)

    def check_steps(self, steps: int) -> int:
        """`steps` if it is ADAPTIVE (0) or 1..max_steps, else UserError."""
        return whole("steps", steps, ADAPTIVE, self.max_steps, use=f"1 to {self.max_steps}, or adaptive")

    def check_fixed_steps(self, steps: int) -> int:
        """`steps` if it is 1..max_steps, else UserError."""
        return whole("fixed steps", steps, 1, self.max_steps)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Inverse of `to_json`. Older ones have no fit: theirs was the default. ValueError names what is unknown,
        missing, of another kind or not positive."""
        if isinstance(data, dict):
            data = {"fit": cls.fit, **data}
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            odd = sorted(set(data) ^ known) if isinstance(data, dict) else [type(data).__name__]
            raise ValueError(f"the configuration does not fit this version (fields {', '.join(odd)})")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        for name, value in values.items():
            like = getattr(FULL, name)
            numbers, wanted = (v if isinstance(v, tuple) else (v,) for v in (value, like))
            if [type(v) for v in numbers] != [type(v) for v in wanted] or type(value) is not type(like):
                raise ValueError(f"{name} {json.dumps(data[name])} of the configuration is of another kind")
            if any(not isinstance(v, str) and v < 1 for v in numbers):
                raise ValueError(f"{name} {json.dumps(data[name])} of the configuration is below 1")
        try:
            return cls(**values)
        except UserError as error:
            raise ValueError(str(error)) from None


FULL = Config("full")
DEMO = Config(
    "demo",
    height=112,
    width=192,
    visual_channels=(32, 64, 128, 192),
    visual_heads=(1, 2, 4, 6),
    visual_depths=(1, 2, 3, 1),
    audio_patch=(64, 96),  # VGGish's native patch, so that nothing is resized
    vggish_channels=(16, 32, 64, 96),
    audio_heads=3,
    audio_ffn=192,
    ffn_channels=(16, 32, 64, 128),
    beca_channels=(32, 64, 128, 128),
    beca_heads=(1, 2, 4, 4),
    gate_channels=(16, 32, 64, 128),
    noise_channels=(16, 32, 64, 128),
    step_channels=128,
    decoder_channels=(24, 48, 64, 96),
    decoder_heads=(1, 2, 2, 3),
)
CONFIGS = {c.name: c for c in (FULL, DEMO)}


def weights_seed(checkpoint: str | Path, seed: int | None) -> int:
    """The seed of a checkpoint's random weights, 0 unless one is given. UserError if one is given for a checkpoint, or
    for a folder made of one, whose weights are not to be drawn, or that is no seed."""
    if seed is not None and not str(checkpoint).startswith(RANDOM):
        raise UserError(f"no weights are drawn for {checkpoint}: leave out their seed {seed}, or name {RANDOM}SIZE")
    return 0 if seed is None else check_seed(seed)


def get_config(name: str, variant: str = "full", fit: str = FITS[0]) -> Config:
    """The named configuration in the given variant, trained with the given fit. UserError for an unknown name."""
    if name not in CONFIGS:
        raise UserError(f"unknown config {name!r}: choose one of {', '.join(CONFIGS)}")
    return replace(CONFIGS[name], variant=variant, fit=fit)
