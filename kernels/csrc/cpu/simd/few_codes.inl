// 4-bit weights of a few tokens (w4a16.inl) where no instruction looks sixteen numbers up.
// Codes - 8 of a vector of dwords, code J times UNIT[J]: masked without being shifted down.
struct FewCodes {
    static constexpr float UNIT[8] = {1, 16, 256, 4096, 65536, 1048576, 16777216, 1};
    template <int J>
    F of(I word) const {
        if constexpr (J == 7)
            return sub(to_float(shift_right<28>(word)), splat(8.0f));
        else
            return sub(to_float(and_(word, splat_int(15 << 4 * J))),
                       splat(static_cast<float>(8 << 4 * J)));
    }
};
