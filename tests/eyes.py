"""Colours as eyes see them, for tests of what is drawn."""

import numpy as np
from matplotlib.colors import to_rgb

# What linear RGB becomes for eyes without one kind of cone: Machado, Oliveira and Fernandes (2009),
# doi 10.1109/TVCG.2009.113, severity 1.0.
VISIONS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colours) -> np.ndarray:
    """Linear RGB [n, 3] of sRGB colours."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def luminance(colour) -> float:
    """Relative luminance, 0 to 1."""
    return float(linear([colour])[0] @ TO_XYZ[1])


def seen(colours, vision: str) -> np.ndarray:
    """CIELAB [n, 3] (CIE 15:2004, D65), where a distance of about 2 can just be seen."""
    xyz = np.clip(linear(colours) @ np.array(VISIONS[vision]).T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
