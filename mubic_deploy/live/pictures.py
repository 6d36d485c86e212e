"""What is shown of a stream, frames with their maps over them, in the order in which `predict` writes them."""

from __future__ import annotations

from collections import deque

from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.feeder import Feeder
from mubic_deploy.live.outputs import Outputs
from mubic_deploy.live.report import LiveMap
from mubic_deploy.media.film import Frame


class Pictures:
    """Hands frames and maps on to the overlay and the window, a step at a time, because one step may be slow: a map
    goes after the last frame of its window.

    In order, the frame after that waits until the map is there, as in `predict`: the overlay holds only so many frames,
    and would lay an older map over those that it cannot hold. The source then waits, too. Else frames go on without
    their maps."""

    def __init__(self, client: StreamClient, feeder: Feeder, outputs: Outputs, stride: int, in_order: bool) -> None:
        self._client, self._feeder, self._outputs = client, feeder, outputs
        self._stride, self._in_order = stride, in_order
        self._after = client.config.frames - 1 - client.config.middle  # frames of a window after its map's
        self._next = client.config.middle  # the frame of the next map, unless its window is lost
        self._frame: Frame | None = None  # the next one
        self._maps: deque[LiveMap] = deque()

    def add_map(self, found: LiveMap) -> None:
        if self._outputs.wants_frames:
            self._maps.append(found)

    def step(self) -> bool:
        """Hands on one frame or one map. False if there is none to be handed on yet."""
        frame = self._peek()
        if self._maps and (frame is None or frame.index > self._maps[0].frame_index + self._after):
            found = self._maps.popleft()
            self._next = found.frame_index + self._stride
            self._outputs.show_map(found)
            return True
        if frame is None or self._must_wait(frame):
            return False
        self._frame = None
        self._outputs.show_frame(frame)
        return True

    def finish(self) -> None:
        """Hands on all that is left; no more maps come."""
        self._in_order = False
        while self.step():
            pass

    def _peek(self) -> Frame | None:
        if self._frame is None and not self._feeder.waiting.empty():
            self._frame = self._feeder.waiting.get()
        return self._frame

    def _must_wait(self, frame: Frame) -> bool:
        # where no window is pending, the next one needs frames that may wait behind this one
        early = not self._maps and frame.index > self._next + self._after
        return self._in_order and early and self._outputs.wants_frames and self._client.pending > 0
