"""From a model to a file in production: formats, precisions, and the gate that lets nothing unequal through."""
