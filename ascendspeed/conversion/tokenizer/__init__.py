"""Export of a sentencepiece tokenizer as tokenizer.json."""
