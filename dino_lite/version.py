"""Version of the package: read by hatchling, written to exports and environment.json."""

__version__ = "0.1.0"
