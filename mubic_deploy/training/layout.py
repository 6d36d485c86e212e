"""The field's data layout: frames, sounds, fixations and folds as released with STAViS and used by its successors.

    video_frames/<dataset>/<video>/img_00001.jpg
    video_audio/<dataset>/<video>/<video>.wav
    annotations/<dataset>/<video>/maps/eyeMap_00001.jpg    density, grey
    annotations/<dataset>/<video>/fixMap_00001.mat         binary fixations in the variable `eyeMap`
    fold_lists/<dataset>_list_<part>_<split>_fps.txt       one video a line: name, frames, frames per second

No PyTorch."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.media.sound import known_layout, resampler
from mubic_deploy.training.settings import DATASETS, PARTS, SPLITS

FIXATIONS = "eyeMap"  # the variable in the .mat files
LIST_NAME = rf"(.+)_list_(?:{'|'.join(PARTS)})(?:_\d+)?_fps\.txt"
ASPECT_TOLERANCE = 0.02
DEEP = "I;16"  # how Pillow's modes of 16 bits begin
DIGESTED = 65_536  # bytes of a file that `digest` reads
JPEG_END, JPEG_TAIL = b"\xff\xd9", 32  # the end marker, in the last bytes of the file


@dataclass(frozen=True)
class Video:
    """One line of a fold list. Frames count from 1; frame i is shown at (i - 1) / fps seconds of the sound."""

    root: Path
    dataset: str
    name: str
    frames: int
    fps: float

    def frame(self, i: int) -> Path:
        return self.root / "video_frames" / self.dataset / self.name / f"img_{i:05d}.jpg"

    def map(self, i: int) -> Path:
        return self.root / "annotations" / self.dataset / self.name / "maps" / f"eyeMap_{i:05d}.jpg"

    def fixations(self, i: int) -> Path:
        return self.root / "annotations" / self.dataset / self.name / f"fixMap_{i:05d}.mat"

    @property
    def sound(self) -> Path:
        return self.root / "video_audio" / self.dataset / self.name / f"{self.name}.wav"

    def __str__(self) -> str:
        return f"{self.dataset}/{self.name}"


def dataset_of(video: str) -> str:
    """The data set of what `str` makes of a `Video`."""
    return video.split("/", 1)[0]


def write_map(folder: Path, video: Video, frame: int, saliency: np.ndarray) -> None:
    """A predicted map [H, W] in [0, 1], as 8-bit grey, where the data set has the true one, but for the folder and PNG:
    `folder`/<dataset>/<video>/eyeMap_00001.png. OSError if it cannot be written."""
    path = folder / video.dataset / video.name / video.map(frame).with_suffix(".png").name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(saliency, 0, 1) * 255).round().astype(np.uint8)).save(path)


def read_list(root: str | os.PathLike[str], dataset: str, part: str, split: int) -> list[Video]:
    """The videos of one fold, in the list's order.

    A data set with one fold for all splits (DIEM) has lists without the split's number. UserError for a missing or an
    empty list, or a line that is not `name frames fps`."""
    root = Path(root)
    if not _is_name(dataset):
        raise UserError(f"{dataset!r} is no name of a data set: give that of a folder in video_frames")
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(map(str, SPLITS))}")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the one that holds video_frames, annotations and fold_lists")
    path = _list(root, dataset, part, split)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        others = f" (lists are there of {', '.join(found)})" if (found := datasets(root)) else ""
        raise UserError(
            f"fold list {path} does not exist{others}: get {dataset}'s fold lists, or check the folder"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"fold list {path} cannot be read ({_reason(error)}): get it again") from error
    videos = [_parse(root, dataset, path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not videos:
        raise UserError(f"fold list {path} names no video: get it again (of scenes, render 4 or more)")
    return videos


def fold_list(root: Path, dataset: str, part: str, split: int) -> Path:
    return root / "fold_lists" / f"{dataset}_list_{part}_{split}_fps.txt"


def _list(root: Path, dataset: str, part: str, split: int) -> Path:
    path = fold_list(root, dataset, part, split)
    shared = path.with_name(f"{dataset}_list_{part}_fps.txt")
    return shared if not path.is_file() and shared.is_file() else path


def has_list(root: Path, dataset: str, part: str, split: int) -> bool:
    return _list(root, dataset, part, split).is_file()


def _is_name(name: str) -> bool:
    """Whether it can be that of a folder where it belongs, and of no other."""
    return Path(name).name == name and name != ".." and "\0" not in name


def datasets(root: Path) -> list[str]:
    """The data sets that have a fold list: those of `settings.DATASETS` in its order, then others, which may have any
    name."""
    matches = (re.fullmatch(LIST_NAME, name) for name in listing(root / "fold_lists"))
    found = {match[1] for match in matches if match}
    return [name for name in DATASETS if name in found] + sorted(found - set(DATASETS))


def _parse(root: Path, dataset: str, path: Path, number: int, line: str) -> Video:
    try:
        name, frames, fps = line.strip().rsplit(maxsplit=2)  # a name may hold spaces
        video = Video(root, dataset, name, int(frames), float(fps))
    except ValueError:
        video = None
    if video is None or video.frames < 1 or not 0 < video.fps < math.inf or not _is_name(video.name):
        raise UserError(
            f"fold list {path}, line {number}: {line.strip()!r} is not `name frames fps`, such as `V1_Speech1 250 25`: "
            f"correct the line"
        )
    return video


def read_frame(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], RGB. UserError names the file."""
    return _read_image(path, "RGB")


def read_density(path: Path) -> np.ndarray:
    """float32 [H, W] in [0, 1]: grey / 255. UserError names the file."""
    return _read_image(path, "L").astype(np.float32) / np.float32(255)


def read_fixations(path: Path) -> np.ndarray:
    """bool [H, W]: where somebody looked; a sparse matrix is taken too. UserError names the file."""
    from scipy.io import loadmat
    from scipy.sparse import issparse

    try:
        with path.open("rb") as file:
            values = loadmat(file, variable_names=[FIXATIONS]).get(FIXATIONS)
        if issparse(values):
            values = values.toarray()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: get the data set's annotations again") from error
    except Exception as error:  # SciPy's parser lets through whatever a damaged file made it stumble on
        raise UserError(
            f"{path} is not a MATLAB file that SciPy can read ({_reason(error)}): get it again, or save it as version 7"
        ) from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "buif":
        raise UserError(f"{path} holds no matrix `{FIXATIONS}`: get the data set's annotations again")
    return values > 0


def read_sound(path: Path) -> np.ndarray:
    """float32 [n] in [-1, 1], 16 kHz mono, from the file's first sample on; channels are mixed as in films.

    UserError names the file."""
    blocks: list[np.ndarray] = []
    try:
        with av.open(path.absolute()) as container:
            if not container.streams.audio:
                raise UserError(f"{path} holds no sound: extract the video's sound track again")
            resample = resampler()
            for frame in container.decode(container.streams.audio[0]):
                frame.pts = None
                blocks += [out.to_ndarray()[0] for out in resample.resample(known_layout(frame))]
            if blocks:
                blocks += [out.to_ndarray()[0] for out in resample.resample(None) if out is not None]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: extract the video's sound track into it") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a sound file that FFmpeg can read ({_reason(error)}): get it again") from error
    if not blocks:
        raise UserError(f"{path} holds no sound that can be decoded: extract the video's sound track again")
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():  # floats of a file can be anything
        at_s = np.isfinite(samples).argmin() / SAMPLE_RATE
        raise UserError(f"{path} is damaged (at {at_s:.2f} s it is not finite): extract the video's sound track again")
    return np.clip(samples, -1, 1).astype(np.float32, copy=False)


def _read_image(path: Path, mode: str) -> np.ndarray:
    with open_image(path) as image:
        return np.asarray(decode(image, path, mode))


def open_image(path: Path) -> Image.Image:
    """Opens a picture and reads its header only: `size` is (width, height). UserError names the file."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: get the data set's pictures again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that Pillow can read: get it again") from error


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) by the picture's header, at a fraction of decoding it; but a JPEG without its end is decoded, to
    see whether anything is missing. UserError names the file."""
    with open_image(path) as image:
        _require_levels(image, path)
        if image.format == "JPEG":
            with path.open("rb") as file:
                file.seek(-JPEG_TAIL, os.SEEK_END)
                if JPEG_END not in file.read():
                    decode(image, path, "RGB")
        return image.height, image.width


def decode(image: Image.Image, path: Path, mode: str) -> Image.Image:
    """The pixels of an opened picture as Pillow's `mode`, of 16 bits the upper 8, rounded. UserError names the file."""
    _require_levels(image, path)
    try:
        if image.mode.startswith(DEEP):  # `convert` would cut off all that is above 255
            levels = np.asarray(image)
            if 0 < levels.max() <= 255:
                raise UserError(f"{path} has 16 bits, and all of it is nearly black: save it as 8-bit grey")
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}): get it again") from error


def _require_levels(image: Image.Image, path: Path) -> None:
    """UserError if nothing says what is white."""
    if image.mode in ("I", "F"):
        raise UserError(f"{path} has more than 8 bits and does not say what is white: save it as 8-bit grey")


def once(videos: Iterable[Video]) -> tuple[list[Video], list[str]]:
    """Each data set's videos of a name once, as they come first; and a warning if any comes again, else none."""
    first: dict[str, Video] = {}
    again: dict[str, None] = {}  # in order
    for video in videos:
        if str(video) in first:
            again[str(video)] = None
        else:
            first[str(video)] = video
    if not again:
        return list(first.values()), []
    named = f"{len(again)} of {len(first)} videos are named more than once, the first is {next(iter(again))}"
    return list(first.values()), [f"{named}: each counts once, with the frames and fps of its first line"]


def in_both(training: Sequence[Video], validation: Sequence[Video]) -> list[str]:
    """A warning if there are videos in both parts, else none."""
    known = {str(video) for video in training}
    both = [str(video) for video in validation if str(video) in known]
    if not both:
        return []
    return [
        f"{len(both)} of {len(validation)} videos of the test part are in the training part too, the first is "
        f"{both[0]}: figures on them do not say how other videos would do"
    ]


def digest(videos: Iterable[Video], sounds: bool = True) -> str:
    """8 hex digits by which other data under the same names are noticed, wherever they lie: CRC-32 over each video's
    first frame, middle density map (a release may lack it) and sound, of each the length and first 64 KiB. sounds:
    whether they count. UserError names a file that is there and cannot be read."""
    crc = 0
    for video in videos:
        for path in (video.frame(1), video.map(video.frames // 2 + 1), *([video.sound] if sounds else [])):
            try:
                with path.open("rb") as file:
                    begin, length = file.read(DIGESTED), file.seek(0, os.SEEK_END)
            except FileNotFoundError:
                begin, length = b"", -1
            except OSError as error:
                raise UserError(f"{path} cannot be read ({_reason(error)}): get it again") from error
            crc = zlib.crc32(begin, zlib.crc32(str(length).encode(), crc))
    return f"{crc:08x}"


def labelled(video: Video) -> list[int]:
    """The frames that have both a density and a fixation map. The releases lack some."""
    maps, fixations = listing(video.map(1).parent), listing(video.fixations(1).parent)
    return [i for i in range(1, video.frames + 1) if video.map(i).name in maps and video.fixations(i).name in fixations]


def require_shape(path: Path, size: tuple[int, ...], frame: tuple[int, int]) -> None:
    """UserError if a map's (height, width) is not of the frames' shape, at whatever size."""
    if abs(size[1] / size[0] * frame[0] / frame[1] - 1) > ASPECT_TOLERANCE:
        raise UserError(
            f"{path} is {sized(size)}, another shape than the frames' {sized(frame)}: "
            f"make the maps for the frames that were shown"
        )


def listing(folder: Path) -> set[str]:
    """The names in a folder, by one listing; none if there is no such folder. UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({_reason(error)}): check the folder, or the fold list") from error


def sized(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
