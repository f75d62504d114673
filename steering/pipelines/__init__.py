"""Control inversion of diffusers pipelines: their own ``__call__`` answers our questions."""

from __future__ import annotations

from steering.pipelines.check import CheckReport, check
from steering.pipelines.schedule import SchedulePath
from steering.pipelines.wrap import WrappedPipeline, wrap

__all__ = ["CheckReport", "SchedulePath", "WrappedPipeline", "check", "wrap"]
