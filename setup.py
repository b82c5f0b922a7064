"""All metadata is in pyproject.toml; this file is where native sources from csrc/ will be declared."""

from setuptools import setup

setup()
