"""From a film to its saliency maps, an overlay and a contact sheet, in one pass and bounded memory."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mubic_deploy.beside import Behind, ahead
from mubic_deploy.config import Config, check_fit, check_seed
from mubic_deploy.errors import UserError, whole
from mubic_deploy.media.clips import Clip, Clipper
from mubic_deploy.media.film import Film, Frame
from mubic_deploy.media.maps import FilmMap, MapsWriter
from mubic_deploy.media.naming import naming
from mubic_deploy.media.outputs import check_targets, replacing
from mubic_deploy.media.overlay import SUFFIXES, OverlayWriter
from mubic_deploy.media.sheet import ContactSheet
from mubic_deploy.media.source import Source, is_file
from mubic_deploy.pipeline import Predictor, stacked

Target = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
BESIDE = 16  # frames and clips that a thread reads ahead, or as many as a batch needs; as many wait to be written
BESIDE_BYTES = 128 << 20  # of the former and of the latter at most, unless four have more
KINDS = {"overlay": SUFFIXES, "maps": (".npz",), "contact sheet": (".png",)}


@dataclass(frozen=True)
class Prediction:
    """What `predict_film` did.

    steps_used   how many maps took how many denoising steps
    seconds      wall time
    warnings     what the film lacked, one line each"""

    maps: int
    frames: int
    steps_used: dict[int, int]
    seconds: float
    warnings: list[str] = field(default_factory=list)


class _Sink(Protocol):
    """Where a film's frames and maps go. `finish` completes the file, `close` lets go of it at any time."""

    def add_frame(self, frame: Frame) -> None: ...
    def add_map(self, item: FilmMap) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


def predict_film(
    predictor: Predictor,
    source: Source,
    *,
    overlay: Target | None = None,
    maps: Target | None = None,
    contact_sheet: Target | None = None,
    steps: int | None = None,
    seed: int = 0,
    stride: int = 4,
    fit: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Prediction:
    """Predicts frames 8, 8 + stride, 8 + 2 * stride .. of a film, each from the 16 frames and the sound around it.

    source         a path, or a URL that FFmpeg can read
    overlay        .mp4, .m4v, .mov or .mkv: the film with its saliency over it (see `OverlayWriter`)
    maps           .npz: every map, in the film's geometry (see `MapsWriter`)
    contact_sheet  .png: eight frames and their overlays
    steps          1 to the predictor's `config.max_steps`, 0 for adaptive, None for the default
    seed           of the noise; the same for every clip, so that maps do not flicker
    fit            letterbox, stretch or crop (see `make_fit`), None for what the model was trained with
    batch          clips that are predicted at once: the same maps, sooner where a GPU has room for more than one; the
                   frames since the first of them are held in memory, and about BESIDE_BYTES before and after them
    progress       called with the frames done and, if the container says it, their number

    While clips are predicted, one thread reads what comes next and another writes what was before; `predictor` and
    `progress` are called in the caller's own. The outputs appear together at the end; after any error or interrupt the
    targets are as they were. UserError for a film, an output or a setting that cannot work, mostly before anything is
    predicted."""
    began = time.monotonic()
    targets = _targets(overlay, maps, contact_sheet)
    _check_settings(predictor.config, steps, seed, stride, fit, batch)
    with Film(source) as film:
        check_targets(targets, KINDS, Path(film.source) if is_file(film.source) else None)
        counts: Counter[int] = Counter()
        frames = 0
        with replacing(targets) as staged, ExitStack() as stack:
            sinks = {}
            for kind, path in staged.items():
                with naming(kind, targets[kind]):
                    sinks[kind] = _sink(kind, path, film, predictor.config.frames)
                stack.callback(sinks[kind].close)

            def write(item: Frame | FilmMap) -> None:
                for kind, sink in sinks.items():
                    with naming(kind, targets[kind]):
                        sink.add_frame(item) if isinstance(item, Frame) else sink.add_map(item)

            clipper = stack.enter_context(closing(Clipper(film, predictor.config, stride, fit)))
            count = _beside(film.frame_bytes, predictor.config, stride, batch)
            items = stack.enter_context(closing(ahead(_read(film, clipper), count)))
            behind = stack.enter_context(Behind(count))
            for item in _run(predictor, clipper, items, steps, seed, batch):
                behind(write, item)
                if isinstance(item, FilmMap):
                    counts[item.steps_used] += 1
                    continue
                frames += 1
                if progress is not None:
                    progress(frames, film.expected)
            behind.drain()
            for kind, sink in sinks.items():
                with naming(kind, targets[kind]):
                    sink.finish()
        seconds = time.monotonic() - began
        return Prediction(counts.total(), frames, dict(sorted(counts.items())), seconds, film.warnings)


def check(
    source: Source, *, overlay: Target | None = None, maps: Target | None = None, contact_sheet: Target | None = None
) -> None:
    """UserError if `predict_film` could not read this film or write these outputs. Takes no time, so it can come
    before whatever takes some to get ready."""
    targets = _targets(overlay, maps, contact_sheet)
    with Film(source) as film:
        check_targets(targets, KINDS, Path(film.source) if is_file(film.source) else None)


def predict_clips(
    predictor: Predictor,
    source: Source,
    *,
    steps: int | None = None,
    seed: int = 0,
    stride: int = 4,
    fit: str | None = None,
    batch: int = 1,
    warnings: list[str] | None = None,
) -> Generator[FilmMap]:
    """The maps of a film as they are predicted, without writing anything. Settings as in `predict_film`.

    warnings: a list that is filled with what the film lacks. UserError for a setting at once, for the film with the
    first map that is asked for."""
    _check_settings(predictor.config, steps, seed, stride, fit, batch)

    def predicted() -> Generator[FilmMap]:
        with Film(source) as film:
            if warnings is not None:
                film.warnings = warnings
            with closing(Clipper(film, predictor.config, stride, fit)) as clipper:
                # no thread: a generator may be left at any time, anywhere
                for item in _run(predictor, clipper, _read(film, clipper), steps, seed, batch):
                    if isinstance(item, FilmMap):
                        yield item

    return predicted()


def _run(
    predictor: Predictor,
    clipper: Clipper,
    items: Iterable[Frame | Clip],
    steps: int | None,
    seed: int,
    batch: int,
) -> Iterator[Frame | FilmMap]:
    """Every frame of `items`, see `_read`, and every map after the last frame of its clip. With a batch they come some
    frames late, in the same order."""
    held: list[Frame | Clip] = []  # from the first clip that waits for its batch

    def predicted() -> Iterator[Frame | FilmMap]:
        clips = [item for item in held if isinstance(item, Clip)]
        video, audio = (stacked(predictor, arrays) for arrays in zip(*((c.video, c.audio) for c in clips), strict=True))
        results = zip(*predictor.predict(video, audio, seed, steps), strict=True)
        for item in held:
            if isinstance(item, Frame):
                yield item
            else:
                saliency, (used,) = next(results)
                yield FilmMap(item.frame_index, item.time_s, clipper.fit.back(saliency), int(used))
        held.clear()

    waiting = 0
    for item in items:
        waiting += isinstance(item, Clip)
        if waiting:
            held.append(item)
        elif isinstance(item, Frame):
            yield item
        if waiting == batch:
            yield from predicted()
            waiting = 0
    if held:
        yield from predicted()


def _read(film: Film, clipper: Clipper) -> Iterator[Frame | Clip]:
    """Every frame, and behind it the clip that it completes."""
    for frame in film.frames():
        # before the frame is handed on to another thread: to resize one PyAV writes its colours for a moment
        clip = clipper.push(frame)
        yield frame
        if clip is not None:
            yield clip
    clip = clipper.finish()
    if clip is not None:
        yield clip


def _beside(frame_bytes: int, config: Config, stride: int, batch: int) -> int:
    """How many frames and clips may be read before they are wanted, and as many wait to be written: so many that
    neither stops while a batch is predicted, if they are not too large."""
    clip_bytes = 3 * config.frames * config.height * config.width
    most = (stride + 1) * BESIDE_BYTES // (stride * frame_bytes + clip_bytes)
    return max(4, min(most, max(BESIDE, batch * (stride + 1))))


def _targets(overlay: Target | None, maps: Target | None, contact_sheet: Target | None) -> dict[str, Path]:
    """The outputs that are wanted, by kind."""
    given = {"overlay": overlay, "maps": maps, "contact sheet": contact_sheet}
    targets = {kind: Path(path) for kind, path in given.items() if path is not None}
    if not targets.keys() & {"overlay", "maps"}:
        raise UserError("nothing to write: ask for an overlay (-o) or maps (--maps); a contact sheet comes beside")
    return targets


def _check_settings(config: Config, steps: int | None, seed: int, stride: int, fit: str | None, batch: int) -> None:
    if steps is not None:
        config.check_steps(steps)
    check_seed(seed)
    whole("stride", stride, 1, unit=" frames")
    whole("batch", batch, 1, unit=" clips")
    check_fit(fit or config.fit)


def _sink(kind: str, path: Path, film: Film, window: int) -> _Sink:
    if kind == "overlay":
        return OverlayWriter(path, film)
    if kind == "maps":
        return MapsWriter(path, film.map_shape)
    return ContactSheet(path, film.name, window)
