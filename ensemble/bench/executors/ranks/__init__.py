"""N models over the ranks of torchrun: see the README of this folder."""
