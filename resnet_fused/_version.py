"""The package's version, for those that must not import the package: pyproject.toml says it too."""

__version__ = "0.1.0"
