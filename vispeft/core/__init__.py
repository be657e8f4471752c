"""The vocabulary: sites, units, methods, plans and the families of timm models; nothing here has a forward pass."""
