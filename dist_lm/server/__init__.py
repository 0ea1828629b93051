"""An address that OpenAI's clients talk to: requests as values, an engine in a thread, the application around them."""
