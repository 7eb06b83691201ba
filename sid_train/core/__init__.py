"""Noise schedule, few-step sampling and recipe: torch, safetensors and the standard library only."""
