"""What can go wrong in the engine, in one place.

EngineError
├── ConfigError         a setting that cannot work; the message names it, its value and what to do
├── StartError          the engine cannot start: no model, port taken, no memory for one block
├── DeviceOutOfMemory   one step needed more device memory than there is
├── PoolError           misuse of the block pool (double release, unknown block): a bug, with the ids
└── ChannelClosed       the other process is gone
"""


class EngineError(Exception):
    """Anything this engine raises on purpose; the message is one line for an operator."""


class ConfigError(EngineError):
    """A setting that cannot work."""


class StartError(EngineError):
    """The engine cannot start."""


class DeviceOutOfMemory(EngineError):
    """A step needed more device memory than there is. The requests' state is as before the step."""


class PoolError(EngineError):
    """The block pool was misused; `blocks` are the ids concerned."""

    def __init__(self, message: str, blocks: tuple[int, ...] = ()) -> None:
        super().__init__(f"{message}: blocks {list(blocks)}" if blocks else message)
        self.blocks = blocks


class ChannelClosed(EngineError):
    """The process at the other end of the channel is gone."""
