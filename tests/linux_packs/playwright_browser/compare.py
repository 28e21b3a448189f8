"""compare.py EXPECTED PICTURE: prints how many of a thousand pixels differ, edges of letters aside. Ends with 1 when
the pictures have not the same size."""

import sys

from PIL import Image, ImageChops

expected, picture = (Image.open(path).convert("RGB") for path in sys.argv[1:])
if expected.size != picture.size:
    sys.exit(f"{picture.size} is not {expected.size}")
difference = ImageChops.difference(expected, picture).convert("L").point(lambda value: 255 if value > 40 else 0)
print(1000 * difference.histogram()[255] // (expected.width * expected.height))
