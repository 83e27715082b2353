"""Two runs, one curve? Logs of any kind -> aligned steps -> figures -> a verdict that anyone can check."""
