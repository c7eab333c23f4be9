"""The zoo: published architectures of three libraries, by name.

Chosen by use, whatever becomes of them. Left out are models that share their blocks with another of the same library
under another name (CodeGen is GPT-J, LayoutLM is BERT, HuBERT is wav2vec 2.0), and those that few use.
"""

from normfx.survey import sense_zoo, text_zoo, timm_zoo, torchvision_zoo
from normfx.survey.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for zoo in (text_zoo, sense_zoo, timm_zoo, torchvision_zoo) for family in zoo.FAMILIES
}
