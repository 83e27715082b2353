"""Generation as commands: what is typed, prompts and answers as files, conversations, and how fast it goes."""
