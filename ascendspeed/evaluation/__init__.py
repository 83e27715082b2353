"""How well a model answers: benchmarks as they lie on disk -> questions -> prompts -> answers -> figures."""
