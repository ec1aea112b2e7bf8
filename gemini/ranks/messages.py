"""What ranks write to each other. Tensors travel beside these letters, by the tag that a letter names."""

import msgspec


class Letter(msgspec.Struct, frozen=True, tag=True):
    """Base of all."""


class Request(Letter, frozen=True, tag="request"):
    """Send me values that are at home with you."""

    chunk: int
    name: str
    start: int
    """Where they begin: see `chunk.Span`."""
    numel: int
    dtype: str
    """What they are to be converted to."""
    epoch: int
    """The number of agreed changes that they are to have seen."""
    rounds: int
    """Of gradients: the rounds that they are to be the sum of."""
    generation: int
    """Of gradients: how often they have been dropped before these."""
    tag: int
    """By which a word of status comes: 0 if the values do, too."""
    values_tag: int


class Failure(Letter, frozen=True, tag="failure"):
    """Why a request cannot be answered."""

    tag: int
    text: str


class Part(Letter, frozen=True, tag="part"):
    """What my backward adds to the gradient of your extent of a chunk."""

    generation: int
    round: int
    chunk: int
    present: list[int]
    """Positions of the slots that have a gradient."""
    anew: list[int]
    """Positions whose sums so far are forgotten first."""
    numel: int
    """0 where nothing comes by the tag."""
    dtype: str
    tag: int


class Received(Letter, frozen=True, tag="received"):
    """The tensor of a part has arrived: its memory is yours again."""

    tag: int


class RoundEnd(Letter, frozen=True, tag="round"):
    """My backward is over."""

    generation: int
    rounds: int
    """How many of this generation are."""


class Pause(Letter, frozen=True, tag="pause"):
    """I run no backward before we have all voted on this."""

    number: int


class Vote(Letter, frozen=True, tag="vote"):
    """I am about to do this, and wait until all are."""

    number: int
    epoch: int
    doing: str
    word: bytes
    """What the others need to know, in MessagePack."""


class Withdrawal(Letter, frozen=True, tag="withdrawal"):
    """I have waited for too long, and did not do it."""

    number: int


class Finished(Letter, frozen=True, tag="finished"):
    """I have done alone what the others wait for."""

    what: str
    error: str


class Waiting(Letter, frozen=True, tag="waiting"):
    """I wait for what you do alone, and can do a part of it."""

    what: str
    time: int
    """How often I have waited for that before."""


class Task(Letter, frozen=True, tag="task"):
    """Do this part of what you wait for."""

    what: str
    word: bytes
    """What there is to know, in MessagePack."""


class Done(Letter, frozen=True, tag="done"):
    """I have done my part."""

    what: str
    time: int
    error: str


class Ping(Letter, frozen=True, tag="ping"):
    """Are you there? It cannot be delivered if not."""


class Goodbye(Letter, frozen=True, tag="goodbye"):
    """I need nothing of you any more; I serve you until you say the same."""

    reason: str


_OfErrands = Finished | Waiting | Task | Done
AnyLetter = Request | Failure | Part | Received | RoundEnd | Pause | Vote | Withdrawal | _OfErrands | Ping | Goodbye

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyLetter).decode


def encode(letter: Letter) -> bytes:
    """A letter as bytes."""
    return _encode(letter)


def decode(data: bytes) -> AnyLetter:
    """The letter that `encode` made bytes of."""
    letter: AnyLetter = _decode(data)
    return letter
