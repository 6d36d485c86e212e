"""The signatures of the graphs: the one source for names, shapes and types of every tensor.

Export, engines, Triton configurations, clients and checks read them here. A tensor has the same name everywhere.
Shapes leave out the batch axis, which is the first and the only dynamic one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from mubic_deploy.config import AUDIO_SAMPLES, AUDIO_SLICES, PRECISIONS, Config
from mubic_deploy.errors import UserError

FLOAT32, FLOAT16 = PRECISIONS
ENSEMBLE = "mubic"  # the whole chain as one model of Triton
FIXED_ENSEMBLE = "mubic_fixed"  # the same with the sampler instead of the loop
SAMPLER = "sampler"
STREAM = "mubic_stream"  # the model of live streams
BYTES = "bytes"  # a tensor's type where each element is a string of bytes
ANY = -1  # of a shape: as many as a request brings


class Shaped(Protocol):
    """NumPy's arrays, and what engines keep on a device."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


ShapedT = TypeVar("ShapedT", bound=Shaped)


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # NumPy's name, or BYTES
    shape: tuple[int, ...]  # without the batch axis

    @property
    def nbytes(self) -> int:
        """Of one clip."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: ShapedT) -> ShapedT:
        """`array` if it is [B, *shape] of this dtype, else UserError."""
        want = f"{self.dtype} [{', '.join(str(n) for n in ('batch', *self.shape))}]"
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise UserError(f"tensor {self.name} must be {want}, not {type(array).__name__}: give an array of NumPy's")
        if array.dtype != self.dtype or len(array.shape) != len(self.shape) + 1 or array.shape[1:] != self.shape:
            other = "convert it" if array.shape[1:] == self.shape else "give clips of the model's configuration"
            raise UserError(f"tensor {self.name} must be {want}, not {array.dtype} {list(array.shape)}: {other}")
        return array


@dataclass(frozen=True)
class Signature:
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def input_names(self) -> list[str]:
        return [t.name for t in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [t.name for t in self.outputs]

    def batch(self, inputs: Mapping[str, ShapedT]) -> tuple[int, dict[str, ShapedT]]:
        """The batch size of the inputs, which all have, and each input checked, in the signature's order. UserError
        for one that is none, or where they differ."""
        arrays = {t.name: t.check(inputs[t.name]) for t in self.inputs}
        batch, *others = {array.shape[0] for array in arrays.values()}
        if others:
            raise UserError(f"the tensors of {self.name} must have the same batch size")
        return batch, arrays


def video(c: Config) -> Tensor:
    """RGB frames in display order, 0..255."""
    return Tensor("VIDEO", "uint8", (c.frames, c.height, c.width, 3))


def audio() -> Tensor:
    """16 kHz mono in [-1, 1], centred on the clip's middle frame (eq. 3.2 to 3.4)."""
    return Tensor("AUDIO", "float32", (AUDIO_SAMPLES,))


def visual_features(c: Config, precision: str = FLOAT32) -> tuple[Tensor, ...]:
    """V1..V4, f_v of eq. 3.13, channels first."""
    pairs = zip(c.visual_channels, c.grids, strict=True)
    return tuple(Tensor(f"V{i}", precision, (n, c.time, *grid)) for i, (n, grid) in enumerate(pairs, 1))


def audio_features(c: Config, precision: str = FLOAT32) -> Tensor:
    """A, f_a of eq. 3.8, channels first: [C_a, T_a, h_a, w_a]."""
    return Tensor("A", precision, (c.vggish_channels[-1], AUDIO_SLICES, *c.audio_grid))


def conditioning(c: Config, precision: str = FLOAT32) -> tuple[Tensor, ...]:
    """COND: what the decoder uses at every step. CONTEXT1..3 are A_i of eq. 3.44, CONTEXT4 is f_con_4 (eq. 3.42)
    in the decoder's width, KEYS4 and VALUES4 its compressed keys and values (eq. 3.47)."""
    pairs = list(zip(c.decoder_channels, c.grids, strict=True))
    contexts = [Tensor(f"CONTEXT{i}", precision, (n, c.time, *grid)) for i, (n, grid) in enumerate(pairs, 1)]
    if c.variant == "no_diffusion":
        return tuple(contexts)
    h, w = c.grids[-1]
    tokens = c.time * -(-h // 2) * -(-w // 2)
    keys = [Tensor(name, precision, (tokens, c.decoder_channels[-1])) for name in ("KEYS4", "VALUES4")]
    return (*contexts, *keys)


def initial_noise(c: Config) -> Tensor:
    """S_T: the noisy map in [-1, 1]'s scale, at first nothing but noise."""
    return Tensor("S_T", "float32", (1, *c.map_size))


def step_inputs(c: Config) -> tuple[Tensor, ...]:
    """The noisy map, its step t, and alpha-bar of this step and of the next, per sample."""
    return (
        initial_noise(c),
        Tensor("STEP", "int32", (1,)),
        Tensor("ALPHA_NOW", "float32", (1,)),
        Tensor("ALPHA_NEXT", "float32", (1,)),
    )


SEED = Tensor("SEED", "int64", (1,))  # keys the noise, >= 0
ENTROPY = Tensor("ENTROPY", "float32", (1,))  # of f_av_1, in [0, 1]
ADAPTIVE_STEPS = Tensor("ADAPTIVE_STEPS", "int32", (1,))  # N of section 3.2.6, 1..12


def signatures(c: Config, precision: str = FLOAT32, sampler: bool = False) -> dict[str, Signature]:
    """The graphs of a configuration by name, in the order they run. `visual_only` has no audio_encoder.

    precision: of what flows between the graphs; what people see (pictures, sound, maps) and the loop's S_T stay.
    sampler: with the graph that stands for the denoiser and its loop where the number of steps is fixed."""
    features, cond = visual_features(c, precision), conditioning(c, precision)
    encoded = (*features, audio_features(c, precision)) if c.has_audio else features
    saliency = Tensor("S_0", "float32", (1, *c.map_size))  # in [0, 1]
    graphs = [
        Signature("visual_encoder", (video(c),), features),
        Signature("audio_encoder", (audio(),), (audio_features(c, precision),)),
        Signature("fusion", encoded, conditioner(c, precision).outputs),
        Signature(
            "denoiser",
            (*cond, *step_inputs(c)),
            (saliency, Tensor("S_NEXT", "float32", (1, *c.map_size))),
        ),
    ]
    if sampler:
        graphs.append(Signature(SAMPLER, (*cond, initial_noise(c)), (saliency_map(c),)))
    return {g.name: g for g in graphs if c.has_audio or g.name != "audio_encoder"}


def parts(c: Config, precision: str = FLOAT32, sampler: bool = False) -> dict[str, tuple[Signature, ...]]:
    """What each graph of `signatures` may be computed in, part by part, so that others need not wait for all of it:
    the visual encoder and the fusion by scale. Tensors between the parts are TOKENS1..3 [1 + t h w, C_i], a scale's,
    the class token first."""
    made: dict[str, tuple[Signature, ...]]
    made = {name: (signature,) for name, signature in signatures(c, precision, sampler).items()}
    features, cond = visual_features(c, precision), conditioning(c, precision)
    sizes = zip(c.visual_channels[:3], c.grids[:3], strict=True)
    tokens = [Tensor(f"TOKENS{i}", precision, (1 + c.time * h * w, n)) for i, (n, (h, w)) in enumerate(sizes, 1)]
    heard = (audio_features(c, precision),) if c.has_audio else ()
    taken, handed_on = (video(c), *tokens), [*((x,) for x in tokens), ()]
    more = [(ENTROPY, ADAPTIVE_STEPS), (), (), cond[4:]]  # of a scale's fusion beside its context
    scales = range(4)
    made["visual_encoder"] = tuple(
        Signature(f"visual_encoder_{i + 1}", (taken[i],), (features[i], *handed_on[i])) for i in scales
    )
    made["fusion"] = tuple(Signature(f"fusion_{i + 1}", (features[i], *heard), (cond[i], *more[i])) for i in scales)
    return made


def conditioner(c: Config, precision: str = FLOAT32) -> Signature:
    """Encoders and fusion as one: a clip in, COND, ENTROPY and ADAPTIVE_STEPS out."""
    return Signature("conditioner", media(c), (*conditioning(c, precision), ENTROPY, ADAPTIVE_STEPS))


def noise(c: Config) -> Signature:
    """A model of Triton's that draws the sampler's noise."""
    return Signature("noise", (SEED,), (initial_noise(c),))


def ddim(c: Config, precision: str = FLOAT32) -> Signature:
    """The sampling loop around `denoiser`: COND and a request's settings in, the map out."""
    return Signature("ddim", (*conditioning(c, precision), ADAPTIVE_STEPS, *settings()), results(c))


def host() -> Signature:
    """A model of Triton's that moves ADAPTIVE_STEPS from a GPU to the host."""
    return Signature("host", (ADAPTIVE_STEPS,), (Tensor("ON_HOST", ADAPTIVE_STEPS.dtype, ADAPTIVE_STEPS.shape),))


def media(c: Config) -> tuple[Tensor, ...]:
    """What a clip is: VIDEO, and AUDIO unless the variant is deaf."""
    return (video(c), audio()) if c.has_audio else (video(c),)


def pipeline(c: Config) -> Signature:
    """The whole chain, in process and as Triton's ensemble, or its model of compiled packages."""
    return Signature(ENSEMBLE, (*media(c), *settings()), results(c))


def fixed_pipeline(c: Config) -> Signature:
    """The chain with the sampler, as Triton's ensemble: the number of steps is the sampler's."""
    return Signature(FIXED_ENSEMBLE, (*media(c), SEED), (saliency_map(c),))


def stream(c: Config) -> Signature:
    """The model of live streams in Triton, a sequence of requests a stream. It has no batch axis, and whatever a
    request has nothing of is left out.

    FRAMES       new frames of the model's input size, RGB in display order; or
    PACKETS      one encoded frame each, as ENCODING says
    FRAME_INDEX  of each new frame in the stream; the last one's plus 1 by default
    FRAME_TIME   of each new frame, seconds of the stream's clock; must grow
    SOUND        new samples, 16 kHz mono in [-1, 1]; none by default
    SOUND_TIME   of the first of them, on the same clock; where the last ones ended by default
    SOUND_END    true: there is no sound (any more), so none is waited for
    SKIP         middle frames of windows that are not wanted
    at the start only: STRIDE (frames between two windows), SEED, STEPS, ENCODING (raw, jpeg or h264), SOUND_RATE

    It answers with one response a window that became complete: the map, and of the window's middle frame MAP_INDEX
    and MAP_TIME; HEARD is the part of the window's sound that there was. A last, empty response ends each request."""
    inputs = (
        Tensor("FRAMES", "uint8", (ANY, c.height, c.width, 3)),
        Tensor("PACKETS", BYTES, (ANY,)),
        Tensor("FRAME_INDEX", "int64", (ANY,)),
        Tensor("FRAME_TIME", "float64", (ANY,)),
        Tensor("SOUND", "float32", (ANY,)),
        Tensor("SOUND_TIME", "float64", (1,)),
        Tensor("SOUND_END", "bool", (1,)),
        Tensor("SKIP", "int64", (ANY,)),
        Tensor("STRIDE", "int32", (1,)),
        *settings(),
        Tensor("ENCODING", BYTES, (1,)),
        Tensor("SOUND_RATE", "int32", (1,)),
    )
    of_window = (
        Tensor("MAP_INDEX", "int64", (1,)),
        Tensor("MAP_TIME", "float64", (1,)),
        Tensor("HEARD", "float32", (1,)),
    )
    return Signature(STREAM, inputs, (*results(c), *of_window))


def settings() -> tuple[Tensor, ...]:
    """SEED; STEPS is N, or 0 for adaptive N."""
    return SEED, Tensor("STEPS", "int32", (1,))


def saliency_map(c: Config) -> Tensor:
    """The map in [0, 1] for the clip's middle frame."""
    return Tensor("SALIENCY", "float32", c.map_size)


def results(c: Config) -> tuple[Tensor, ...]:
    """The map, and how many steps made it."""
    return saliency_map(c), Tensor("STEPS_USED", "int32", (1,))
