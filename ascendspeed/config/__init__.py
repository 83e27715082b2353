"""Configuration of a run and learning-rate schedules."""
