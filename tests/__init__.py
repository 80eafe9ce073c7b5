"""Tests of ``sb3_mbdpo``."""
