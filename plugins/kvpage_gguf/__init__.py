"""One .gguf file as the model (llama.cpp's format): its weights, its config and its tokenizer."""
