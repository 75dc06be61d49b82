"""An attention backend and a logits processor for kvpage, to copy from."""
