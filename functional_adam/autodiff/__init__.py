"""The autograd Function around a kernel, and its batching rule."""
