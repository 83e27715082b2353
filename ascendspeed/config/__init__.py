"""Run configuration: frozen dataclasses and learning-rate schedules."""
