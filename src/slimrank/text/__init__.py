"""Calibration: text, token windows, and the statistics a method asks for."""
