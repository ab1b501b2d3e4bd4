"""Compute COLOUR_NAMES of gigdiff/data/vocabulary.py: shop colour names -> nearest base colour by CIEDE2000.

    python -m pip install matplotlib scikit-image     # neither is needed by gigdiff itself
    python benchmarks/colour_names.py                 # prints the table; paste it into vocabulary.py

The names and their sRGB values are those of the XKCD colour survey (https://xkcd.com/color/rgb/, CC0), which matplotlib
ships. Of its 949 names only those in SHOP_NAMES are taken: what a shop would write, less the names that are things as
well (leather, stone, cherry). A name is kept when its nearest base colour is nearer by MARGIN than the nearest base
colour of any other colour group, so that the group is never a guess, and when no hue word in it says otherwise
("powder blue" must come out blue).
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import XKCD_COLORS, to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

from gigdiff.data.vocabulary import BASE_COLOURS, COLOUR_RGB, COLOUR_SYNONYMS, colour_group

MARGIN = 2.0

#: Base colours that no other name should map to: finishes rather than colours, and names too rare to draw.
NEVER_NEAREST = {"Bronze", "Copper", "Fluorescent Green", "Gold", "Grey Melange", "Metallic", "Mushroom Brown", "Nude",
                 "Silver", "Skin", "Steel"}  # fmt: skip

#: One sRGB value can't stand for all that a shop calls blue: the tints and shades that a name may be near as well.
TINTS = {
    "Blue": [(120, 175, 230), (165, 205, 245), (200, 225, 248), (70, 100, 150)],
    "Brown": [(135, 90, 60), (50, 25, 10)],
    "Green": [(150, 215, 150), (190, 240, 190), (20, 70, 35), (135, 172, 120), (90, 160, 60)],
    "Grey": [(210, 212, 210), (95, 105, 115)],
    "Maroon": [(140, 0, 15)],
    "Pink": [(255, 195, 210), (255, 95, 165), (225, 150, 160)],
    "Purple": [(150, 90, 195), (55, 10, 75)],
    "Red": [(240, 75, 70), (240, 30, 60)],
    "Yellow": [(255, 250, 130), (235, 200, 60)],
}

#: A hue word that ends a name -> the groups it may come out in.
HUES = {
    "aqua": {"teal"}, "aquamarine": {"teal"}, "blue": {"blue", "teal"}, "brown": {"brown", "beige"}, "cyan": {"teal"},
    "green": {"green", "teal"}, "grey": {"grey"}, "lavender": {"purple"}, "lilac": {"purple"}, "lime": {"green"},
    "magenta": {"pink"}, "mauve": {"purple"}, "mint": {"green"}, "navy": {"blue"}, "olive": {"green"},
    "orange": {"orange", "brown"}, "peach": {"orange"}, "pink": {"pink"}, "plum": {"purple"}, "purple": {"purple"},
    "red": {"red"}, "rose": {"pink"}, "tan": {"beige"}, "teal": {"teal"}, "turquoise": {"teal"}, "violet": {"purple"},
    "yellow": {"yellow"}, "indigo": {"blue", "purple"}, "beige": {"beige", "white"}, "gold": {"yellow", "gold"},
    "khaki": {"beige"}, "salmon": {"pink", "orange"}, "coral": {"pink", "orange", "red"},
}  # fmt: skip

SHOP_NAMES = """
    adobe; almost black; apple green; aqua green; aquamarine; army green; auburn; avocado green; azul; baby blue;
    baby green; baby pink; baby purple; banana yellow; barbie pink; battleship grey; black; blood orange; blood red;
    blue green; blue grey; blue purple; blue violet; blueberry; bordeaux; brick orange; brick red; bright aqua;
    bright blue; bright green; bright lavender; bright lilac; bright magenta; bright orange; bright pink;
    bright purple; bright red; bright sky blue; bright teal; bright turquoise; bright violet; bright yellow;
    british racing green; bubblegum pink; burgundy; burnt orange; burnt red; burnt sienna; burnt umber; butter yellow;
    butterscotch; cadet blue; camel; camo; canary; canary yellow; candy pink; caramel; carmine; carnation pink;
    carolina blue; celadon; cerise; cerulean; cerulean blue; charcoal grey; chartreuse; cherry red; chestnut;
    chocolate; chocolate brown; cinnamon; claret; clay brown; cobalt; cobalt blue; cocoa; coffee; cool blue; cool grey;
    coral; coral pink; cornflower; cornflower blue; cranberry; creme; cyan; dark aqua; dark aquamarine; dark beige;
    dark blue; dark brown; dark coral; dark cyan; dark forest green; dark fuchsia; dark green; dark grey;
    dark grey blue; dark hot pink; dark indigo; dark khaki; dark lavender; dark lilac; dark magenta; dark maroon;
    dark mauve; dark mint; dark mustard; dark navy; dark navy blue; dark olive; dark olive green; dark orange;
    dark peach; dark periwinkle; dark pink; dark plum; dark purple; dark red; dark rose; dark royal blue; dark sage;
    dark salmon; dark sand; dark sea green; dark sky blue; dark slate blue; dark tan; dark taupe; dark teal;
    dark turquoise; dark violet; deep aqua; deep blue; deep brown; deep green; deep lavender; deep lilac; deep magenta;
    deep orange; deep pink; deep purple; deep red; deep rose; deep sea blue; deep sky blue; deep teal; deep turquoise;
    deep violet; denim blue; duck egg blue; dusk blue; dusky blue; dusky pink; dusky purple; dusky rose; dusty blue;
    dusty green; dusty lavender; dusty orange; dusty pink; dusty purple; dusty red; dusty rose; dusty teal; ecru;
    eggplant; eggshell; eggshell blue; electric blue; electric green; electric lime; electric pink; electric purple;
    emerald; emerald green; evergreen; faded blue; faded green; faded orange; faded pink; faded purple; faded red;
    faded yellow; fawn; fern green; fire engine red; flat blue; forest green; french blue; fuchsia; golden yellow;
    goldenrod; grass green; green apple; green blue; grey blue; grey green; grey pink; grey purple; greyish brown;
    gunmetal; hazel; hot magenta; hot pink; hot purple; hunter green; ice blue; indian red; indigo blue; irish green;
    ivory; jade; jade green; jungle green; kelly green; key lime; khaki green; kiwi green; lavender blue;
    lavender pink; leaf green; lemon; lemon green; lemon yellow; light aqua; light aquamarine; light beige; light blue;
    light blue grey; light brown; light burgundy; light cyan; light gold; light green; light grey; light grey blue;
    light indigo; light khaki; light lavender; light lilac; light lime; light magenta; light maroon; light mauve;
    light mint; light mustard; light navy; light olive; light orange; light peach; light periwinkle; light pink;
    light plum; light purple; light red; light rose; light royal blue; light sage; light salmon; light sky blue;
    light tan; light teal; light turquoise; light violet; light yellow; lilac; lime; lime yellow; lipstick red;
    mahogany; marigold; marine blue; maroon; medium blue; medium brown; medium green; medium grey; medium pink;
    medium purple; merlot; midnight; midnight blue; midnight purple; military green; milk chocolate; mint; mint green;
    mocha; moss green; mushroom; mustard brown; mustard green; mustard yellow; muted blue; muted green; muted pink;
    muted purple; navy; neon blue; neon pink; neon purple; neon red; neon yellow; ocean blue; ocean green; ocher;
    ochre; off white; old pink; old rose; olive brown; olive drab; olive green; olive yellow; orange brown; orange red;
    orchid; pale aqua; pale blue; pale brown; pale cyan; pale gold; pale green; pale grey; pale lavender; pale lilac;
    pale lime; pale magenta; pale mauve; pale olive; pale orange; pale peach; pale pink; pale purple; pale red;
    pale rose; pale salmon; pale sky blue; pale teal; pale turquoise; pale violet; pale yellow; parchment; pastel blue;
    pastel green; pastel orange; pastel pink; pastel purple; pastel red; pastel yellow; pea green; peachy pink;
    peacock blue; periwinkle; periwinkle blue; petrol; pine green; pistachio; plum; plum purple; powder blue;
    powder pink; prussian blue; puce; pumpkin orange; purple grey; putty; racing green; raspberry; red brown; red wine;
    reddish brown; rich blue; rich purple; robin egg blue; rose pink; rose red; rosy pink; royal blue; royal purple;
    ruby; russet; rust brown; rust orange; rust red; rusty red; saffron; sage; sage green; salmon; salmon pink; sand;
    sand brown; sandstone; sandy brown; sapphire; scarlet; sea blue; seafoam; seafoam blue; seafoam green; sepia;
    shamrock green; shocking pink; sienna; sky blue; slate; slate blue; slate green; slate grey; soft blue; soft green;
    soft pink; soft purple; spearmint; spring green; steel blue; steel grey; stormy blue; sunflower yellow;
    sunny yellow; sunshine yellow; tangerine; tan brown; tea green; teal blue; teal green; terracotta; tiffany blue;
    tomato red; topaz; true blue; true green; turquoise; turquoise green; twilight blue; ultramarine; ultramarine blue;
    umber; vermillion; very dark blue; very dark brown; very light blue; very light green; very light pink; violet;
    violet blue; violet pink; viridian; warm brown; warm grey; warm pink; warm purple; water blue; wine; wine red;
    wintergreen; wisteria; yellow green; yellow ochre; yellow orange
"""


def main() -> None:
    own = {name for names in COLOUR_SYNONYMS.values() for name in names}
    taken = own | {colour.lower() for colour in BASE_COLOURS}
    anchors = [(c, rgb) for c in COLOUR_RGB if c not in NEVER_NEAREST for rgb in (COLOUR_RGB[c], *TINTS.get(c, []))]
    bases = [colour for colour, _ in anchors]
    groups = np.array([colour_group(colour) for colour in bases])
    base_lab = rgb2lab(np.array([rgb for _, rgb in anchors])[None] / 255.0)[0]
    table: dict[str, str] = {}
    for name in sorted({" ".join(part.split()) for part in SHOP_NAMES.split(";")} - taken):
        if f"xkcd:{name}" not in XKCD_COLORS:
            continue
        lab = rgb2lab(np.array(to_rgb(f"xkcd:{name}"))[None, None])[0]
        distance = deltaE_ciede2000(np.broadcast_to(lab, base_lab.shape), base_lab)
        nearest = int(distance.argmin())
        clear = distance[groups != groups[nearest]].min() - distance[nearest] >= MARGIN
        if clear and groups[nearest] in HUES.get(name.split()[-1], {groups[nearest]}):
            table[name] = bases[nearest]
    print("COLOUR_NAMES: dict[str, str] = {")
    for name, base in table.items():
        print(f'    "{name}": "{base}",')
    print("}")


if __name__ == "__main__":
    main()
