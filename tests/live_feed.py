"""A source through a client of `mubic_stream`."""

from __future__ import annotations

import threading
from pathlib import Path

from mubic_deploy import StreamClient
from mubic_deploy.live.items import Heard
from mubic_deploy.live.report import LiveMap
from mubic_deploy.live.source import FileSource, LiveSource
from mubic_deploy.media.film import Frame


def feed(client: StreamClient, source: FileSource | LiveSource, times: list[float] | None = None) -> None:
    """All of a source; times: is filled with when each frame was given."""
    for item in source.items():
        if isinstance(item, Frame):
            client.frame(item.image, item.time_s, source.display)
        elif isinstance(item, Heard):
            client.sound(item.samples, item.start / 16_000)
        else:
            client.end_sound()
    client.finish()


def maps_of(client: StreamClient, path: Path, realtime: bool = False) -> list[LiveMap]:
    with FileSource(str(path), realtime) as source:
        feeding = threading.Thread(target=feed, args=(client, source))
        feeding.start()
        found = list(client)
        feeding.join()
    return found
