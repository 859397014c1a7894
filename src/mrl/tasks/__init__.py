"""Tasks: what a fit needs to know about the answers (start, loss, decode, score); one file each."""

from mrl.tasks.classification import PRIMARY, Classification, class_weights

__all__ = ["PRIMARY", "Classification", "class_weights"]
