"""The sentences of a report in English and Chinese: templates only, filled by `report.py`, nothing is generated."""

from r1jax.tasks.envelope import Language

NOTICE = "Research software, not a medical device."
SYNTHETIC = "Synthetic data, not a patient."

# The keys are the same in both languages; a test holds them together.
SENTENCES: dict[str, dict[str, str]] = {
    "en": {
        "synthetic": SYNTHETIC,
        "binary": "{finding}: {call}, probability {probability}.",
        "present": "called present (at or above the operating threshold {threshold})",
        "absent": "called absent (below the operating threshold {threshold})",
        "indeterminate": "not called, because no operating threshold is known",
        "operating_point": "Operating point: sensitivity {sensitivity} ({positives} positive cases), specificity "
        "{specificity} ({negatives} negative cases), {unit}, {origin}.",
        "not_described": "No nodule is called: its descriptors are not reported.",
        "assumed": "Presence was not assessed: the sub-volume is taken to hold a nodule.",
        "center_mm": "Centre: z {0:.1f}, y {1:.1f}, x {2:.1f} mm from the centre of the sub-volume.",
        "long_axis_mm": "Long axis: {0:.1f} mm.",
        "rating": "{finding}: {level} (probability {probability}); at least {coverage:.0%} together: {levels}.",
        "lung_rads": "Lung-RADS v2022, by rule: {categories} ({basis}).",
        "lung_rads_none": "Lung-RADS v2022, by rule: not assigned ({basis}).",
        "lung_rads_or": " or ",
        "missing": "Inputs missing: {names}.",
        "yes": "yes",
        "no": "no",
        "record": "Record fields read: {names}.",
        "text": "Record text read: {length} characters.",
        "preliminary": "Preliminary, not reviewed by a physician.",
        "notice": NOTICE,
        "comma": ", ",
    },
    "zh": {
        "synthetic": "合成数据，并非患者。",
        "binary": "{finding}：{call}，概率 {probability}。",
        "present": "判为存在（不低于操作阈值 {threshold}）",
        "absent": "判为不存在（低于操作阈值 {threshold}）",
        "indeterminate": "未判定（没有操作阈值）",
        "operating_point": "操作点：灵敏度 {sensitivity}（阳性 {positives} 例），"
        "特异度 {specificity}（阴性 {negatives} 例），{unit}，{origin}。",
        "not_described": "未判为存在结节，不报告结节特征。",
        "assumed": "未评估结节是否存在：按子体积内有结节处理。",
        "center_mm": "中心：相对子体积中心 z {0:.1f}、y {1:.1f}、x {2:.1f} mm。",
        "long_axis_mm": "长径：{0:.1f} mm。",
        "rating": "{finding}：{level}（概率 {probability}）；合计不低于 {coverage:.0%} 的等级：{levels}。",
        "lung_rads": "Lung-RADS v2022（按规则）：{categories}（{basis}）。",
        "lung_rads_none": "Lung-RADS v2022（按规则）：未给出（{basis}）。",
        "lung_rads_or": " 或 ",
        "missing": "缺失的输入：{names}。",
        "yes": "是",
        "no": "否",
        "record": "已读取的病历字段：{names}。",
        "text": "已读取的病历文本：{length} 个字符。",
        "preliminary": "初步结果，未经医生审核。",
        "notice": "研究用软件，不是医疗器械。",
        "comma": "、",
    },
}

# English terms of `schema.py`, `lung_rads.py` and the run in Chinese ("field.term" where a word means two things); a
# term that is not here stays English.
TERMS_ZH: dict[str, str] = {
    "Nodule in the sub-volume": "子体积内结节",
    "Malignancy of the nodule (outcome)": "结节恶性（结局）",
    "Texture": "密度",
    "non-solid": "非实性（磨玻璃）",
    "non-solid to part-solid": "非实性至部分实性",
    "part-solid": "部分实性",
    "part-solid to solid": "部分实性至实性",
    "solid": "实性",
    "Margin": "边缘",
    "poorly defined": "边界不清",
    "near poorly defined": "边界较不清",
    "medium margin": "边界中等",
    "near sharp": "边界较清",
    "sharp": "边界清晰",
    "Spiculation": "毛刺",
    "no spiculation": "无毛刺",
    "nearly no spiculation": "几乎无毛刺",
    "medium spiculation": "中等毛刺",
    "Lobulation": "分叶",
    "no lobulation": "无分叶",
    "nearly no lobulation": "几乎无分叶",
    "medium lobulation": "中等分叶",
    "near marked": "较明显",
    "marked": "明显",
    "Calcification pattern": "钙化类型",
    "popcorn": "爆米花样",
    "laminated": "层状",
    "calcification.solid": "完全性钙化",
    "non-central": "非中心性",
    "central": "中心性",
    "absent": "无钙化",
    "Sphericity": "球形度",
    "linear": "线状",
    "linear to ovoid": "线状至卵圆形",
    "ovoid": "卵圆形",
    "ovoid to round": "卵圆形至圆形",
    "round": "圆形",
    "Subtlety": "显著程度",
    "extremely subtle": "极不明显",
    "moderately subtle": "中度不明显",
    "fairly subtle": "略不明显",
    "moderately obvious": "中度明显",
    "obvious": "十分明显",
    "Likelihood of malignancy as a reader rates it": "阅片者评定的恶性可能",
    "highly unlikely": "极不可能",
    "moderately unlikely": "不太可能",
    "indeterminate": "不确定",
    "moderately suspicious": "中度可疑",
    "highly suspicious": "高度可疑",
    "Age": "年龄",
    "years": "岁",
    "pack-years": "包年",
    "Male sex (1 yes, 0 no)": "男性（1 是，0 否）",
    "Smoking": "吸烟量",
    "Lung cancer in a first-degree relative (1 yes, 0 no)": "一级亲属肺癌史（1 是，0 否）",
    "Earlier malignancy (1 yes, 0 no)": "既往恶性肿瘤（1 是，0 否）",
    "Emphysema (1 yes, 0 no)": "肺气肿（1 是，0 否）",
    "Carcinoembryonic antigen": "癌胚抗原",
    "C-reactive protein": "C 反应蛋白",
    "Haemoglobin": "血红蛋白",
    "volume": "CT 体积",
    "image": "二维图像",
    "table": "病历字段",
    "text": "病历文本",
    "per case": "按病例",
    "validation split": "验证集",
    "presence was not called": "未判定结节是否存在",
    "no nodule called in this sub-volume": "该子体积未判为有结节",
    "benign calcification pattern": "良性钙化类型",
    "texture or size was not predicted": "未预测密度或大小",
    "solid texture and size": "实性结节及大小",
    "part-solid texture and size": "部分实性结节及大小",
    "part-solid texture and size; solid component not measured": "部分实性结节及大小；未测量实性成分",
    "non-solid texture and size": "非实性结节及大小",
    "CT input was missing": "缺少 CT 输入",
    "Sub-volume only, not the whole screening examination; the most likely texture counts; long axis stands for the "
    "mean diameter; no earlier CT, so neither growth nor new nodules; solid component, airway, juxtapleural, cyst, fat "
    "and 4X features are not used.": (
        "仅针对子体积，并非整个筛查检查；取最可能的密度等级；以长径代替平均直径；没有既往 CT，故不含生长与新发结节；"
        "未使用实性成分、气道、胸膜旁、囊腔、脂肪及 4X 特征。"
    ),
}


def term(english: str, language: Language, field: str = "") -> str:
    """A term in the language of the report.

    Args:
      english: As the schema says it.
      language: Of the report.
      field: Name of the finding, for a word that means two things ("solid" texture, "solid" calcification).

    Returns:
      The Chinese term where the report is Chinese and the table has one, otherwise the English one.
    """
    if language == "en":
        return english
    return TERMS_ZH.get(f"{field}.{english}", TERMS_ZH.get(english, english))
