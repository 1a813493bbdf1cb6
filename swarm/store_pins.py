"""Roots that the content store is to keep, and why."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from paris_swarm.dht_schemas.files import quarantine

log = logging.getLogger(__name__)


def read_pins(path: Path) -> dict[str, str]:
    """Root -> reason; none when there is no such file, or when it is damaged, in which case it is set aside."""
    try:
        pins = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is not JSON; set aside as %s", path, quarantine(path).name)
        return {}
    return {str(root): str(reason) for root, reason in pins.items()} if isinstance(pins, dict) else {}
