"""What the icon corpora are made of: pinned packages, which sets share an artist, what is held out.

Integrity strings are those of the npm registry (sha512, base64). A change of a pin or a rule changes the
corpus: raise ``RECIPE``, fetch, read the new data card, and commit the new gallery hashes with the change.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .splits import SplitRules

__all__ = [
    "EMOJIBASE",
    "EMOJI_SETS",
    "FLAG_SETS",
    "FULL",
    "LEFT_OUT",
    "NUMBERED_DRAWINGS",
    "RECIPE",
    "REDRAWS",
    "RENDERER",
    "TIERS",
    "Package",
    "Tier",
]

RECIPE = 1
"""Raised with every change of what the same packages become."""

RENDERER = "resvg-py==0.5.0"
"""With which the gallery hashes were made; other versions are used too, if they lead to the same
galleries."""


@dataclass(frozen=True)
class Package:
    """One npm package at one version, and the sha512 of its archive as the registry states it."""

    name: str
    version: str
    integrity: str

    @property
    def spec(self) -> str:
        """``name@version``, as npm takes it."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The name that ``npm pack`` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _set(name: str, version: str, integrity: str) -> Package:
    return Package(f"@iconify-json/{name}", version, f"sha512-{integrity}==")


@dataclass(frozen=True)
class Tier:
    """A corpus: its packages of icon sets (emojibase comes with each), what is held out, and the sha256 of
    the ids of its galleries at 64 pixels (empty: they are not pinned)."""

    name: str
    packages: tuple[Package, ...]
    rules: SplitRules
    galleries: Mapping[str, str]


EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
DEMO = (
    _set(
        "noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw",
    ),
    _set(
        "twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw",
    ),
    _set(
        "openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ",
    ),
    _set(
        "fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw",
    ),
    _set(
        "emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg",
    ),
    _set(
        "noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA",
    ),
    _set(
        "fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ",
    ),
    _set(
        "streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A",
    ),
    _set(
        "game-icons",
        "1.2.4",
        "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg",
    ),
    _set(
        "icon-park",
        "1.2.4",
        "S8fVl49LG/M9hvwb7ruFGInK21AHMv3IJehOJRJgXPLE39OOCP3wbfTWjro/XzsjxRwdvX/lYdGetFOZI0TaJQ",
    ),
    _set(
        "mdi",
        "1.2.3",
        "O3cLwbDOK7NNDf2ihaQOH5F9JglnulNDFV7WprU2dSoZu3h3cWH//h74uQAB87brHmvFVxIOkuBX2sZSzYhScg",
    ),
)
FULL = Package(
    "@iconify/json",
    "2.2.535",
    "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)
EMOJI_SETS = frozenset(
    [
        "emojione",
        "emojione-monotone",
        "emojione-v1",
        "fluent-emoji",
        "fluent-emoji-flat",
        "fluent-emoji-high-contrast",
        "fxemoji",
        "noto",
        "noto-v1",
        "openmoji",
        "streamline-emojis",
        "twemoji",
    ]
)
"""Sets that draw emoji: their names are looked up among Unicode's."""

FLAG_SETS = frozenset({"cif", "circle-flags", "flag", "flagpack"})
"""Sets that name flags by the two letters of the country."""

REDRAWS = {
    "noto-v1": "noto",
    # Google's icons and the community's additions to them
    **dict.fromkeys(
        ("ic", "material-symbols", "material-symbols-light", "zmdi", "mdi-light", "memory", "line-md"), "mdi"
    ),
    "la": "fa",
    "lucide": "feather",
    "lucide-lab": "feather",
    "famicons": "ion",
    "maki": "pinhead",
    "temaki": "pinhead",
    "covid": "streamline",
    "guidance": "streamline",
    "streamline-emojis": "streamline-emojis",  # the one coloured set of emoji of a house of line icons
    "flat-color-icons": "icons8",
    "wpf": "icons8",
}
"""Sets that repeat or continue the artwork of another one, by its prefix. Other sets are one family if they
name the same author."""

NUMBERED_DRAWINGS = {"icon-park": "words", "streamline-emojis": "digits"}
"""Sets that number further drawings of the same thing at the end of the name, and how."""

LEFT_OUT = {
    "iconmind": "generated in bulk; would be a tenth of the corpus",
    "svg-spinners": "animations, drawn without a subject",
    **dict.fromkeys(
        [
            "catppuccin",
            "devicon",
            "devicon-line",
            "devicon-original",
            "devicon-plain",
            "fa-brands",
            "fa6-brands",
            "fa7-brands",
            "file-icons",
            "fontelico",
            "gcp",
            "k8s",
            "material-icon-theme",
            "skill-icons",
            "unjs",
            "vscode-icons",
        ],
        "brand logos",
    ),
}
"""Sets of the full tier that are left out by name. Iconify's category of logos and licences that forbid
commercial use are left out by rule."""

TIERS = {
    "demo": Tier(
        "demo",
        DEMO,
        SplitRules(
            test_families=frozenset({"openmoji", "icon-park"}),
            val_families=frozenset({"streamline-emojis"}),
            val_share=0.01,
            word_share=0.075,
            word_pictures=(4, 40),
            salt="diptych icons 1",
        ),
        {
            "openmoji_no_people": "8a6ec2f25dd34a0f8b7f168b4391dd6278853b48f60f401b615ad068538e80c6",
            "openmoji": "5fbeb8a71b3373ad12578e8c3e21d0d9093dad385affd0ad4946e9ba73e39d8d",
            "icon_park": "047a7bc3b6b943a7bf9ad599dd926b75edf71429426ae743867fc08cdc7284ec",
            "test_word": "fc1ede06f99970ad8222eed5ec9eeb6ab999a6e34a299136253e6b128a3837bc",
        },
    ),
    "full": Tier(
        "full",
        (FULL,),
        SplitRules(
            test_families=frozenset(
                {"openmoji", "icon-park", "fa", "healthicons", "iconoir", "icons8", "pinhead"}
            ),
            val_families=frozenset({"streamline-emojis"}),
            val_share=0.01,
            word_share=0.05,
            word_pictures=(8, 400),
            salt="diptych icons 1",
        ),
        {},
    ),
}
