"""How others lay out compressed models; each file registers one."""
