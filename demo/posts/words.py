"""Texts in English and Chinese, and the words on signs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SENTENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "travel": {
        "en": (
            "we booked a flight to the island",
            "the hotel near the old town was lovely",
            "packing my suitcase for the long flight",
            "the hotel kept my passport for the trip",
        ),
        "zh": (
            "我们订了去海岛的机票",
            "老城旁边的酒店很舒服",
            "收拾行李准备长途旅行",
            "旅行的护照和酒店都办好了",
        ),
    },
    "food": {
        "en": (
            "this recipe needs garlic and butter",
            "the noodles were spicy and delicious",
            "this recipe is fresh bread and butter",
            "a delicious soup with spicy chicken",
        ),
        "zh": (
            "这道菜要放大蒜和黄油",
            "面条又辣又好吃",
            "新鲜面包和黄油真好吃",
            "这道菜是好吃的鸡汤",
        ),
    },
    "fitness": {
        "en": (
            "twenty push ups and a plank",
            "my gym workout left me sore",
            "lifting heavier weights at the gym",
            "the workout ends with stretching and a plank",
        ),
        "zh": (
            "健身要做二十个俯卧撑",
            "健身房训练后肌肉酸痛",
            "健身房里举更重的哑铃",
            "训练以后肌肉要拉伸",
        ),
    },
    "finance": {
        "en": (
            "the stock market fell again",
            "interest rates and bank loans are rising",
            "saving money at the bank or in stock",
            "the bank and the market worry investors",
        ),
        "zh": (
            "股票市场又下跌了",
            "银行贷款利率上涨",
            "把钱存进银行和基金",
            "投资者在市场卖出股票",
        ),
    },
    "lesson": {
        "en": ("the teacher shows each step to beginners", "sign up for the next lesson"),
        "zh": ("老师给初学者示范每个步骤", "欢迎报名下一节课程"),
    },
    "follow": {
        "en": ("follow us and leave a comment", "share this post with your friends"),
        "zh": ("关注我们并留下评论", "转发给你的好友"),
    },
    "neutral": {
        "en": (
            "it was a quiet afternoon at home",
            "my neighbour painted the door blue",
            "i could not find the keys today",
            "she wrote a letter by the window",
            "the cat slept on the warm chair",
            "nobody knew what to say about it",
            "look at this picture from last week",
            "here is something i made yesterday",
        ),
        "zh": (
            "今天下午家里很安静",
            "邻居把门刷成了蓝色",
            "我找不到钥匙了",
            "她在窗边写信",
            "猫睡在椅子上",
            "大家都不知道说什么",
            "看看上周拍的照片",
            "这是我昨天做的",
        ),
    },
}
"""Topic -> language -> sentences."""

SIGN_WORDS: dict[str, tuple[str, ...]] = {
    "sale": ("SALE", "DISCOUNT", "CHEAP", "OUTLET"),
    "menu": ("MENU", "DESSERT", "COFFEE", "DINNER"),
    "news": ("NEWS", "BREAKING", "REPORT", "HEADLINE"),
    "warning": ("WARNING", "DANGER", "CAUTION", "HAZARD"),
    "prize": ("PRIZE", "WINNER", "LUCKY"),
    "neutral": ("HELLO", "WINDOW", "GARDEN", "NUMBER", "MONDAY", "RIVER", "PAPER", "SILVER"),
}
"""Sign -> its words; neutral words stand on any sign."""


def post_text(rng: np.random.Generator, keys: Sequence[str], noise: float = 0.0) -> str:
    """Return a text of one sentence for each thing it talks about, among neutral ones."""
    language = "zh" if rng.random() < 0.4 else "en"
    neutral = rng.permutation(SENTENCES["neutral"][language])[: 1 if keys else 2]
    sentences = [str(sentence) for sentence in neutral]
    for key in keys:
        sentences.append(str(rng.choice(SENTENCES[key][language])))
    if rng.random() < 0.5 * noise:
        stray = str(rng.choice(list(SENTENCES)))
        sentences.append(str(rng.choice(SENTENCES[stray][language])))
    order = [sentences[i] for i in rng.permutation(len(sentences))]
    if language == "zh":
        return "。".join(order) + "。"
    return ". ".join(sentence.capitalize() for sentence in order) + "."


def sign_lines(rng: np.random.Generator, keys: Sequence[str], noise: float = 0.0) -> list[str]:
    """Return up to three words: one for each thing the sign says, and neutral ones."""
    lines = [str(rng.choice(SIGN_WORDS[key])) for key in keys]
    spare = 3 - len(lines)
    if rng.random() < 0.5 * noise and spare > 1:
        lines.append(str(rng.choice(SIGN_WORDS[str(rng.choice(list(SIGN_WORDS)))])))
        spare -= 1
    count = int(rng.integers(0 if lines else 1, spare + 1))
    lines += [str(word) for word in rng.permutation(SIGN_WORDS["neutral"])[:count]]
    return [lines[i] for i in rng.permutation(len(lines))]
