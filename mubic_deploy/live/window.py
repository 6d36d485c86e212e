"""A stream on the screen, each frame with its map over it. Tk, which comes with Python; for the main thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import av
import numpy as np

from mubic_deploy.errors import UserError
from mubic_deploy.media.film import Frame, Resizer
from mubic_deploy.media.maps import FilmMap
from mubic_deploy.media.overlay import HeatBlend, Matcher

LARGEST = (720, 960)  # height and width of the picture, on a screen that has room for it
SCREEN_PART = 0.8  # of a smaller one
BEHIND_S = 1.0  # of the stream that may wait to be shown: what comes faster than it plays is skipped
STRAY_S = 0.1  # by which the frames may miss the window's clock before it is set anew


class Window:
    """Frames and maps go in as they come: see `Matcher`. A frame is shown when its map is there, at the pace of the
    time stamps, so the window is as late as the maps are.

    q, Escape or closing it ends the stream. Use `with`; `refresh` now and then, or it stands still."""

    def __init__(self) -> None:
        """UserError if there is no tkinter, or no screen."""
        try:
            import tkinter
        except ImportError as error:
            raise UserError(f"--show needs tkinter ({error}): install python3-tk, or leave --show out") from None
        try:
            self._root: tkinter.Tk | None = tkinter.Tk(className="mubic-deploy")
        except tkinter.TclError as error:
            raise UserError(f"--show needs a screen ({error}): set DISPLAY, or leave --show out") from None
        self._root.withdraw()  # until it is known what to show
        picture = tkinter.Label(self._root, borderwidth=0, background="black")
        self._image: tkinter.PhotoImage | None = tkinter.PhotoImage(master=self._root)
        picture.configure(image=self._image)
        picture.pack(expand=True, fill="both")
        self._stop: Callable[[], None] = lambda: None
        self._name = ""
        self._size = LARGEST
        self._matcher = Matcher(live=True)
        self._due: deque[tuple[Frame, np.ndarray]] = deque()
        self._shown_s, self._shown_at = 0.0, -np.inf  # a time stamp, and when it is due on the window's clock
        self._resize, self._convert, self._heat = Resizer(), Resizer(), HeatBlend("yuv420p")

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._root is not None

    def open(self, display: tuple[int, int], name: str, stop: Callable[[], None]) -> None:
        """display: (height, width) of the frames in square pixels; name: for the title; stop: is called when the window
        is closed by whoever looks at it."""
        if self._root is None or self._image is None:
            return
        screen = self._root.winfo_screenheight(), self._root.winfo_screenwidth()
        self._size = picture_size(display, screen)
        self._name, self._stop = name, stop
        self._root.title(name)
        for event in ("<q>", "<Escape>"):
            self._root.bind(event, lambda _: self._closed())
        self._root.protocol("WM_DELETE_WINDOW", self._closed)
        height, width = self._size
        self._root.geometry(f"{width}x{height}")
        self._image.configure(width=width, height=height)
        self._root.deiconify()
        self.refresh()

    def add_frame(self, frame: Frame) -> None:
        if self._root is not None:
            self._due.extend(self._matcher.add_frame(frame))

    def add_map(self, item: FilmMap) -> None:
        if self._root is not None:
            self._due.extend(self._matcher.add_map(item))

    def refresh(self) -> None:
        """Shows the frame that is due, if any, and hears keys."""
        if self._root is None:
            return
        frame = self._next(time.monotonic())
        if frame is not None:
            self._draw(*frame)
        self._root.update()

    def finish(self) -> None:
        """Shows what is left, in its time."""
        self._due.extend(self._matcher.finish())
        while self._root is not None and self._due:
            self.refresh()
            time.sleep(0.01)

    def close(self) -> None:
        root, self._root = self._root, None
        self._image = None  # now: Tk's pictures can only be deleted on its own thread
        self._matcher.clear()
        self._due.clear()
        if root is not None:
            root.destroy()

    def _closed(self) -> None:
        self.close()
        self._stop()

    def _next(self, now_s: float) -> tuple[Frame, np.ndarray] | None:
        """The frame to be drawn now, if another one is due."""
        due, found = self._due, None
        while due:
            time_s = due[0][0].time_s
            behind = due[-1][0].time_s - time_s > BEHIND_S
            late_s = now_s - self._shown_at - (time_s - self._shown_s)
            if -BEHIND_S < late_s < 0 and not behind:  # what is further ahead comes after a gap, which nobody waits for
                break
            found = due.popleft()
            if abs(late_s) > STRAY_S:
                self._shown_s, self._shown_at = time_s, now_s
        return found

    def _draw(self, frame: Frame, saliency: np.ndarray) -> None:
        assert self._root is not None
        assert self._image is not None
        image = self._resize(frame.image, self._size, "yuv420p")
        shown = self._heat(image, saliency)
        shown.colorspace, shown.color_range = image.colorspace, image.color_range
        self._image.configure(data=ppm(self._convert(shown, self._size, "rgb24")), format="PPM")
        self._root.title(f"{self._name}  {frame.time_s:.1f} s")


def picture_size(display: tuple[int, int], screen: tuple[int, int]) -> tuple[int, int]:
    """(height, width) on the screen, even, of frames of this (height, width), smaller or larger as there is room."""
    room = [min(largest, SCREEN_PART * pixels) for largest, pixels in zip(LARGEST, screen, strict=True)]
    scale = min(there / wanted for there, wanted in zip(room, display, strict=True))
    height, width = (max(2, 2 * round(scale * side / 2)) for side in display)
    return height, width


def ppm(image: av.VideoFrame) -> bytes:
    """An rgb24 frame in the one format that Tk reads without a decoder."""
    pixels: Any = image.to_ndarray()
    return b"P6 %d %d 255\n" % (image.width, image.height) + pixels.tobytes()
