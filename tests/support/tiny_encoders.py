"""Makers of small random checkpoints of every family of transformers, processors included."""

import json
import string
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny_models import VOCABULARY

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_TEXT: dict[str, Any] = {**_TOWER, "vocab_size": len(VOCABULARY), "projection_dim": 16}
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*map(chr, _PRINTED), *(chr(256 + i) for i in range(256 - len(_PRINTED)))]
"""The 256 bytes as tokenizers of GPT-2 write them."""
NORMALISATION: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


def _save(folder: Path, name: str, config: Any, **processor: Any) -> Path:
    """Save a model with random weights and what its processor needs."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():  # some start at zero, and would hide what they do
            if parameter.dim() == 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    return folder


def wordpiece(folder: Path, **settings: Any) -> None:
    """Save a WordPiece tokenizer of letters, digits and a few Chinese characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = settings.pop("ends", ("[CLS] $A [SEP]", ("[CLS]", "[SEP]")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ends[0], special_tokens=[(word, vocabulary[word]) for word in ends[1]]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special, **settings).save_pretrained(folder)


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig

    config = CLIPConfig(
        text_config={**_TEXT, "max_position_embeddings": 32, "eos_token_id": 3},
        vision_config={**_TOWER, "image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
    )
    wordpiece(folder, model_max_length=32)
    return _save(folder, "CLIPModel", config, **NORMALISATION)


def siglip(folder: Path, size: int = 32) -> Path:
    """SigLIP, and SigLIP 2 at a fixed size."""
    from transformers import SiglipConfig

    config = SiglipConfig(
        text_config={**_TEXT, "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**_TOWER, "image_size": size, "patch_size": 16},
    )
    wordpiece(folder, model_max_length=64)
    return _save(folder, "SiglipModel", config, **NORMALISATION)


def naflex(folder: Path) -> Path:
    """SigLIP 2 at any size."""
    from transformers import Siglip2Config

    config = Siglip2Config(
        text_config={**_TEXT, "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**_TOWER, "num_patches": 16, "patch_size": 16},
    )
    wordpiece(folder, model_max_length=64)
    return _save(folder, "Siglip2Model", config, **NORMALISATION)


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config

    config = Dinov2Config(**_TOWER, image_size=32, patch_size=16, mlp_ratio=2)
    return _save(folder, "Dinov2Model", config, **NORMALISATION)


def dinov3(folder: Path) -> Path:
    from transformers import DINOv3ViTConfig

    config = DINOv3ViTConfig(**_TOWER, image_size=32, patch_size=16, num_register_tokens=2)
    return _save(folder, "DINOv3ViTModel", config, **NORMALISATION)


def _sentence(folder: Path, mode: str) -> None:
    keys = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{key}": name == mode for name, key in keys.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes), "utf-8")


def sentence_bert(folder: Path, mode: str = "mean", **shape: int) -> Path:
    """MiniLM, E5, BGE: a BERT with sentence-transformers' note of its pooling."""
    from transformers import BertConfig

    wordpiece(folder, model_max_length=64)
    config = BertConfig(
        **{**_TOWER, **shape}, vocab_size=len(VOCABULARY), max_position_embeddings=64
    )
    _save(folder, "BertModel", config)
    _sentence(folder, mode)
    return folder


def qwen3(folder: Path) -> Path:
    """Qwen3-Embedding: a decoder whose last token, an end mark, is the vector."""
    from transformers import Qwen3Config

    wordpiece(folder, padding_side="left", ends=("$A [SEP]", ("[SEP]",)))
    config = Qwen3Config(
        **_TOWER, vocab_size=len(VOCABULARY), head_dim=16, num_key_value_heads=1, pad_token_id=0
    )
    _save(folder, "Qwen3Model", config)
    _sentence(folder, "last")
    return folder


def ast(folder: Path) -> Path:
    from transformers import ASTConfig, ASTFeatureExtractor

    config = ASTConfig(**_TOWER, frequency_stride=64, time_stride=64, max_length=1024)
    made: Any = ASTFeatureExtractor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of its own 128 bands is empty
        made().save_pretrained(folder)
    return _save(folder, "ASTModel", config)


def clap(folder: Path, *, fused: bool = False) -> Path:
    """CLAP; `fused` as the checkpoints that look at long sounds twice."""
    from transformers import ClapConfig, ClapFeatureExtractor

    audio = {
        "patch_size": 16,
        "patch_stride": [16, 16],
        "patch_embeds_hidden_size": 16,
        "window_size": 4,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "enable_fusion": fused,
        "aff_block_r": 2,
    }
    config = ClapConfig(
        text_config={**_TEXT, "max_position_embeddings": 64, "pad_token_id": 0},
        audio_config=audio,
        projection_dim=16,
    )
    made: Any = ClapFeatureExtractor
    made(truncation="fusion" if fused else "rand_trunc").save_pretrained(folder)
    wordpiece(folder, model_max_length=32)
    return _save(folder, "ClapModel", config)


def fused_clap(folder: Path) -> Path:
    return clap(folder, fused=True)


def whisper(folder: Path) -> Path:
    from transformers import WhisperConfig, WhisperFeatureExtractor

    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    made: Any = WhisperFeatureExtractor
    made().save_pretrained(folder)
    return _save(folder, "WhisperModel", config)


def talking_whisper(folder: Path, *, languages: Sequence[str] = ("en", "de")) -> Path:
    """Whisper with its decoder and a tokenizer of single bytes; it says letters at random."""
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    vocabulary = {letter: i for i, letter in enumerate(_BYTES)}
    marks = ["endoftext", "startoftranscript", *languages, "transcribe", "translate"]
    ids = {f"<|{m}|>": len(_BYTES) + i for i, m in enumerate((*marks, "nospeech", "notimestamps"))}
    config = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=32,
        vocab_size=len(_BYTES) + len(ids),
        init_std=0.5,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    made: Any = WhisperFeatureExtractor
    made().save_pretrained(folder)
    _save(folder, "WhisperForConditionalGeneration", config)
    letters = {vocabulary[letter] for letter in string.ascii_lowercase + "\u0120"}  # and a space
    generation: Any = GenerationConfig
    generation(
        is_multilingual=bool(languages),
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in languages},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=sorted({*range(config.vocab_size)} - letters - {config.eos_token_id}),
        **{key: getattr(config, key) for key in ("pad_token_id", "eos_token_id", "bos_token_id")},
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=32,
    ).save_pretrained(folder)
    end = "<|endoftext|>"
    about = {
        "tokenizer_class": "WhisperTokenizer",
        **{f"{name}_token": end for name in ("unk", "bos", "eos", "pad")},
        "added_tokens_decoder": {
            str(place): {"content": mark, "special": True, "normalized": False}
            for mark, place in ids.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, end: ids[end]}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return folder


def vjepa2(folder: Path) -> Path:
    from transformers import VJEPA2Config

    config = VJEPA2Config(
        crop_size=32,
        frames_per_clip=4,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        mlp_ratio=2,
        pred_hidden_size=16,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=1,
        pred_num_mask_tokens=1,
    )
    return _save(folder, "VJEPA2Model", config, **NORMALISATION)


def videomae(folder: Path) -> Path:
    from transformers import VideoMAEConfig

    config = VideoMAEConfig(**_TOWER, image_size=32, num_frames=4)
    return _save(folder, "VideoMAEModel", config, **NORMALISATION)


def embedding_gemma2(folder: Path) -> Path:
    """EmbeddingGemma 2 with its towers; only where transformers knows it."""
    import transformers
    from transformers import PreTrainedTokenizerFast

    wordpiece(folder, padding_side="right")
    marks = {
        f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")
    }
    load: Any = PreTrainedTokenizerFast
    tokenizer = load.from_pretrained(folder, extra_special_tokens=marks)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video|>"]})
    ids = {key: tokenizer.convert_tokens_to_ids(mark) for key, mark in marks.items()}
    made: Any = transformers
    processor = made.EmbeddingGemma2Processor(
        feature_extractor=made.Gemma4AudioFeatureExtractor(),
        image_processor=made.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=made.EmbeddingGemma2VideoProcessor(),
        image_seq_length=70,
    )
    processor.save_pretrained(folder)
    small = {**_TOWER, "num_key_value_heads": 1, "head_dim": 16}
    text = {**small, "vocab_size": len(tokenizer), "embedding_dim": 24, "pad_token_id": 0}
    text |= {"hidden_size_per_layer_input": 8, "global_head_dim": 16}
    config = made.EmbeddingGemma2Config(
        text_config=text,
        vision_config={"model_type": "gemma4_vision", **small, "num_key_value_heads": 2},
        audio_config={
            "model_type": "gemma4_audio",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 8],
            "output_proj_dims": 32,
        },
        image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        audio_token_id=ids["audio_token"],
        boa_token_id=ids["boa_token"],
        eoa_token_index=ids["eoa_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    return _save(folder, "EmbeddingGemma2Model", config)


PICTURES: dict[str, Callable[[Path], Path]] = {
    "clip": clip,
    "siglip": siglip,
    "siglip2 naflex": naflex,
    "dinov2": dinov2,
    "dinov3": dinov3,
}
TEXTS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "mean (MiniLM, E5)": (sentence_bert, {"pooling": "mean", "prefix": "query: "}),
    "cls (BGE)": (lambda folder: sentence_bert(folder, "cls"), {"pooling": "cls"}),
    "last (Qwen3-Embedding)": (qwen3, {"pooling": "last"}),
    "tokens (BERT)": (sentence_bert, {"pooling": "tokens"}),
}
SOUNDS: dict[str, Callable[[Path], Path]] = {
    "ast": ast,
    "clap": clap,
    "clap fused": fused_clap,
    "whisper": whisper,
}
VIDEOS: dict[str, Callable[[Path], Path]] = {"vjepa2": vjepa2, "videomae": videomae}
