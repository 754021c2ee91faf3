"""What ``lumos benchmark`` measures."""
