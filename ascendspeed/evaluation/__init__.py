"""Benchmark evaluation: files on disk -> questions -> prompts -> answers -> scores."""
