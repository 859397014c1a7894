"""Networks registered with timm."""
