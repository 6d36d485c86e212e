"""The thread that reads a stream's source."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

from mubic_deploy.config import SAMPLE_RATE
from mubic_deploy.errors import UserError
from mubic_deploy.live.client import StreamClient
from mubic_deploy.live.items import Heard
from mubic_deploy.live.pace import Pace
from mubic_deploy.live.source import FileSource, LiveSource
from mubic_deploy.media.film import Frame, most_waiting


class Feeder:
    """The thread that reads the source and feeds the client.

    waiting   frames for the outputs, in order: each is here before the client has it, so that no map comes before its
              window's frames
    left_out  how many frames the outputs could not take in time
    fed       how many frames the client got
    problem   what ended the source before its time"""

    def __init__(
        self,
        source: FileSource | LiveSource,
        client: StreamClient,
        stopped: threading.Event,
        *,
        frames: bool,
        drop: bool,
        paced: bool,
    ) -> None:
        """frames: the outputs want them; drop: the source does not wait for the outputs; paced: no frame goes on before
        its time, however early it comes."""
        self.waiting: queue.Queue[Frame] = queue.Queue(most_waiting(source.frame_bytes))
        self.fed = self.left_out = 0
        self.problem: UserError | None = None
        self._source, self._client, self._stopped = source, client, stopped
        self._frames, self._drop = frames, drop
        self._pace = Pace() if paced else None
        self.thread = threading.Thread(target=self._run, name="mubic-source", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for item in self._source.items():
                if self._stopped.is_set():
                    return
                self._feed(item)
        except UserError as error:
            if not self._stopped.is_set():  # else the client was finished under it
                self.problem = error
        except Exception as error:  # the thread's end must not pass for the source's
            self.problem = UserError(f"{self._source.name} cannot be read any further: {error!r}")
        finally:
            with contextlib.suppress(UserError):  # it is over already, and who reads it knows
                self._client.finish()

    def _feed(self, item: Any) -> None:
        if isinstance(item, Frame):
            if self._pace is not None:
                self._stopped.wait(self._pace.wait_s(item.time_s, time.monotonic()))
            if self._frames and not self._hand_on(item):
                return
            self._client.frame(item.image, item.time_s, self._source.display)
            self.fed += 1
        elif isinstance(item, Heard):
            self._client.sound(item.samples, item.start / SAMPLE_RATE)
        else:
            self._client.end_sound()

    def _hand_on(self, frame: Frame) -> bool:
        """False if the stream was stopped before there was room."""
        while not self._stopped.is_set():
            try:
                self.waiting.put(frame, not self._drop, 0.1)
                return True
            except queue.Full:
                if self._drop:
                    self.left_out += 1
                    return True
        return False
