"""The recorder that a configuration asks for."""

from kvpilot.config import Config
from kvpilot.recordings.recorder import Kept, Recorder, Rolling


def build_recorder(config: Config) -> Recorder | None:
    """None where nothing is to be kept. Touches no file: the first flush does."""
    kept = config.recording
    if not kept.size_mb:
        return None
    assert kept.directory is not None, "load() has filled this in"
    promises = [[each.name, each.ttft, each.itl, each.ttft_per_prompt_token] for each in config.classes]
    about = {"engine": config.engine_name, "promises": promises}
    return Recorder(Rolling(kept.directory, about, Kept(round(kept.size_mb * 1e6), kept.age)))
