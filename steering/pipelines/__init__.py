"""Control inversion of diffusers pipelines: their own ``__call__`` answers our questions."""

from __future__ import annotations

from steering.pipelines.schedule import SchedulePath
from steering.pipelines.wrap import WrappedPipeline, wrap

__all__ = ["SchedulePath", "WrappedPipeline", "wrap"]
