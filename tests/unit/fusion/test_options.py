"""Options of the commands become settings; a mistake in them is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import infer_net
import train_net
from common.errors import ConfigError
from config.settings import InferSettings
from config.train import BackboneTrainSettings, TrainSettings
