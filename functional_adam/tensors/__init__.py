"""Nothing of Adam: layouts, who is watching, pytrees, columns of leaves, recycled memory."""
