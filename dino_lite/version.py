"""The package's version: read by hatchling, written into exports and environment.json."""

__version__ = "0.1.0"
