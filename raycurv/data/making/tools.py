"""What all that makes examples of rows works with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from raycurv.data.examples import Example
from raycurv.data.labels import Labels
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.conversation_tokens import ConversationTokens
from raycurv.data.making.encoder import Encoder
from raycurv.data.making.further import FurtherColumns
from raycurv.data.making.lengths import Lengths
from raycurv.data.making.reader_settings import ReaderSettings


class Maker(Protocol):
    """Makes examples of rows, of one nature of inputs."""

    def make(self, chunk: Chunk) -> Iterator[Example]:
        """The examples of a chunk in its order, numbered 0 all; UserError for what is in it."""


@dataclass(frozen=True)
class Tools:
    """What makers share.

    Attributes:
        settings: what model and objective ask of the rows.
        encoder: makes tokens of texts.
        talks: makes tokens of conversations.
        lengths: keeps examples within the longest length.
        labels: reads labels of whole examples.
        further: reads the columns besides.
    """

    settings: ReaderSettings
    encoder: Encoder
    talks: ConversationTokens
    lengths: Lengths
    labels: Labels
    further: FurtherColumns
