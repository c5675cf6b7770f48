"""Colour operations one at a time, in float64, as their definitions say; levels are 0 to 255."""

import colorsys

import numpy as np


def grey_of(image: np.ndarray) -> np.ndarray:
    return image @ np.array([299, 587, 114]) / 1000


def blend(image: np.ndarray, other, factor: float) -> np.ndarray:
    return np.clip(other + factor * (image - other), 0, 255)


def hue_of(image: np.ndarray, turns: float) -> np.ndarray:
    def shifted(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + turns) % 1, s, v)

    return np.apply_along_axis(shifted, -1, image)


def oracle(image: np.ndarray, operation: str, value: float) -> np.ndarray:
    match operation:
        case "brightness":
            return blend(image, 0, value)
        case "contrast":
            return blend(image, int(grey_of(image).mean() + 0.5), value)
        case "saturation":
            return blend(image, grey_of(image)[..., None], value)
        case "hue":
            return hue_of(image, value)
